"""The likelihood bound of each image of a data set, and simple coders for comparison."""

import functools
import io
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from scipy.special import gammaln

from diffusion_jax import likelihood, sampling
from diffusion_jax.data import pixels
from diffusion_jax.data.cache import Cached, OnTheFly
from diffusion_jax.errors import one_line
from diffusion_jax.parts import Parts
from diffusion_jax.pictures import grids
from diffusion_jax.running import files
from diffusion_jax.running.watch import LONG, duration, waiting

MANY = 10_000  # largest number of images for the coders
QUICK = 256  # images of a quick evaluation
TERMS = 25  # of the bound in one program; also the strata of a quick evaluation


def evaluate_split(
    run: Parts,
    sigma: jax.Array,
    params: dict,
    dataset: Cached | OnTheFly,
    chosen: np.ndarray,
    seed: int,
    batch_size: int,
    partial: epath.Path,
    identity: str,
    with_labels: bool = False,
    quick: bool = False,
) -> dict:
    """Measures the images at the indices `chosen` of one split.

    Args:
      sigma: [T + 1] deviations of the reverse steps in the bound.
      chosen: int [n], sorted.
      batch_size: images at a time over all devices.
      partial: a file of intermediate results; a second call with the same `identity` resumes from it.
      identity: a digest of everything that the numbers depend on.
      with_labels: True gives the network the class of each image, for p(x | y); False is p(x), or p(x | ∅).
      quick: True measures one term t of each of up to TERMS strata of 1..T, of nearly equal length in log-SNR and drawn
        anew for each image, and weights it by the length of the stratum: the mean stays that of the whole bound, and
        the standard error over images holds the error of the drawing.

    Returns:
      Means over the images: bits_per_dim with its standard_error, prior, decoder, rate (bits/dim), distortion
      (root mean square error, scale 0..255), loss (15), the loss and the rate-distortion curve by t, and the
      bits/dim of two simple coders.
    """
    num_steps = run.schedule.num_steps
    strata = sampling.grid_log_snr(run.schedule, min(TERMS, num_steps) if quick else num_steps)
    of = sigma, params, dataset, chosen, seed, batch_size, partial, identity, with_labels
    each, sums = _bound(run, *of, strata[::-1])
    n, (total, prior, decoder, squared_error) = len(chosen), each.mean(axis=0)
    terms, squared_errors, losses, _ = sums / n
    rate, distortion = rate_distortion(prior, terms, squared_errors)
    ts = strata[-2::-1].tolist()  # the last step of each stratum
    return {
        "n": n,
        "of": len(dataset),
        "bits_per_dim": total,
        "standard_error": each[:, 0].std(ddof=1) / math.sqrt(n) if n > 1 else None,
        "prior": prior,
        "decoder": decoder,
        "rate": total - decoder,
        "distortion": 127.5 * math.sqrt(squared_error),
        "histogram_bits_per_dim": histogram_bits(dataset[chosen[:MANY]]),
        "png_bits_per_dim": png_bits(dataset[chosen[:MANY]]),
        "loss": float(losses @ np.diff(strata[::-1]) / num_steps),
        "loss_by_t": {"t": ts, "loss": _short(losses)},
        "rate_distortion": {"t": ts, "rate": _short(rate), "distortion": _short(distortion)},
    }


def rate_distortion(
    prior: float, terms: ArrayLike | Sequence[float], squared_errors: ArrayLike | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rate-distortion curve of progressive coding, Ho et al. (2020), figure 5 and table 4.

    Args:
      prior: [] bits/dim, like the others a mean over examples.
      terms: [T] bits/dim, see `likelihood.vlb_by_step`.
      squared_errors: [T] mean squared errors of the predicted x_0, see `likelihood.vlb_by_step`.

    Returns:
      (rate, distortion), float64 [T] each, step t in entry t − 1. `rate` is the bits/dim that transmit x_t.
      `distortion` is the root mean square error, on the scale 0..255, of the x_0 predicted from x_t.
    """
    terms, squared_errors = np.asarray(terms, np.float64), np.asarray(squared_errors, np.float64)
    rate = prior + np.cumsum(terms[::-1])[::-1] - terms
    return rate, 127.5 * np.sqrt(squared_errors)


def _short(values):
    return [float(f"{value:.6g}") for value in values]


def _bound(run, sigma, params, dataset, chosen, seed, batch_size, partial, identity, with_labels, strata):
    """Returns (each [n, 4]: total, prior, decoder, squared error of t = 1; sums [4, K] of `vlb_by_step` over images).

    The K strata are the steps strata[k] + 1 .. strata[k + 1]; a term counts as many times as its stratum has steps.
    The file `partial` keeps both after every batch. Image i draws its noise and its steps from (seed, i) alone, so
    the numbers do not depend on devices or processes, up to rounding.
    """
    processes, devices = jax.process_count(), jax.local_device_count()
    per_device = max(1, batch_size // (processes * devices))
    batch = per_device * devices * processes
    each, sums = _read_partial(partial, identity, len(chosen), len(strata) - 1)
    terms_of = _terms_fn(run, sigma, f"{partial.stem}: {len(chosen):,} images, {len(strata) - 1:,} steps t each")
    params, rng = jax.device_put(params), jax.random.key(seed)
    sizes = np.diff(strata)
    if processes > 1:
        multihost_utils.sync_global_devices("read")  # before process 0 writes
    with tqdm.tqdm(
        total=len(chosen), initial=len(each), unit="image", desc=partial.stem, disable=jax.process_index() != 0
    ) as bar:
        for first in range(len(each), len(chosen), batch):
            wanted = chosen[first : first + batch]
            padded = np.resize(wanted, batch).reshape(processes, devices, per_device)[jax.process_index()]
            ts = _draw_steps(seed, padded, strata)
            arrays = terms_of(params, rng, _examples(dataset, padded, with_labels), padded, ts, len(chosen) - first)
            if processes > 1:
                arrays = multihost_utils.process_allgather(arrays)
            prior, *by_step = (np.float64(x).reshape(batch, *x.shape[arrays[0].ndim :])[: len(wanted)] for x in arrays)
            by_step = np.stack(by_step)
            terms, squared_errors = by_step[0] * sizes, by_step[1]
            new = np.stack([prior + terms.sum(axis=1), prior, terms[:, 0], squared_errors[:, 0]], axis=1)
            by_stratum = terms.sum(axis=0), *by_step[1:].sum(axis=1)
            each, sums = np.concatenate([each, new]), sums + np.stack(by_stratum)
            if jax.process_index() == 0:
                _write_partial(partial, each, sums, identity)
            bar.update(len(wanted))
    return each, sums


def _draw_steps(seed, indices, strata):
    """Returns a step of each stratum for the images at `indices` [D, B], a function of (seed, index): int [D, B, K]."""
    share = np.stack([np.random.default_rng((seed, i)).random(len(strata) - 1) for i in indices.ravel()])
    ts = strata[:-1] + 1 + np.floor(share * np.diff(strata)).astype(int)
    return ts.reshape(*indices.shape, -1).astype(np.int32)


def _terms_fn(run: Parts, sigma: jax.Array, text: str) -> Callable:
    """Returns (params, rng, a batch [D, B, …], indices [D, B], ts [D, B, K], images left) -> prior and four [D, B, K].

    The steps go in equal parts of up to TERMS through one program. The first tells how long all images will take.
    """

    def bound(params, rng, batch, indices, ts):
        x_0, keys = pixels.from_uint8(batch["image"]), sampling.image_keys(rng, indices)
        labels = {"labels": batch["label"]} if "label" in batch else {}
        eps_bar_fn = functools.partial(run.network, {"params": params}, **labels)
        prior = likelihood.prior_kl(run.schedule, x_0).mean(axis=tuple(range(1, x_0.ndim))) / math.log(2)
        by_step = likelihood.vlb_by_step(eps_bar_fn, run.schedule, sigma, x_0, keys, clip=run.clip, ts=ts.T)
        return prior, *(x.T for x in by_step)

    program, known = jax.pmap(bound, in_axes=(None, None, 0, 0, 0)), list[float]()  # the seconds of the first batch

    def terms_of(params, rng, batch, indices, ts, left):
        number = -(-ts.shape[-1] // TERMS)
        parts = np.array_split(np.pad(ts, [(0, 0), (0, 0), (0, -ts.shape[-1] % number)], mode="edge"), number, axis=-1)
        if not known:
            waiting("compiling the bound", lambda: program.lower(params, rng, batch, indices, parts[0]).compile())
        results = []
        for part in parts:
            began = time.monotonic()
            arguments = params, rng, batch, indices, part
            results.append(waiting(text, lambda arguments=arguments: jax.device_get(program(*arguments))))
            if not known:
                known.append((time.monotonic() - began) * number)
                seconds = known[0] * -(-left // (indices.size * jax.process_count()))
                if seconds > LONG and jax.process_index() == 0:
                    fewer = (
                        f"--quick takes about {duration(seconds / number * min(1, QUICK / left))}, --num=N fewer images"
                    )
                    tqdm.tqdm.write(f"{text}: about {duration(seconds)}" + (f"; {fewer}" if number > 1 else ""))
        prior = results[0][0]
        return prior, *(np.concatenate(x, axis=-1)[..., : ts.shape[-1]] for x in list(zip(*results, strict=True))[1:])

    return terms_of


def _examples(dataset, indices, with_labels):
    """Returns the images at indices [D, B] as {"image": [D, B, H, W, C]}, and their "label" [D, B] where asked."""
    if not with_labels:
        return {"image": dataset[indices]}
    return {name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in dataset.examples(indices.ravel()).items()}


def _read_partial(path, identity, num, num_steps):
    """Returns the content of the file, or empty arrays if it is missing, damaged or of another identity."""
    empty = np.zeros((0, 4)), np.zeros((4, num_steps))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            if str(content["identity"]) != identity:
                return empty
            each, sums = content["each"], content["sums"]
        if each.shape != (min(len(each), num), 4) or sums.shape != (4, num_steps):
            raise ValueError(f"arrays {each.shape} and {sums.shape}")
        return np.float64(each), np.float64(sums)
    except FileNotFoundError:
        return empty
    except Exception as error:  # NumPy and zipfile raise many types
        if jax.process_index() == 0:
            print(f"{path} is damaged ({one_line(error, 200)}): measuring its images again")
        return empty


def _write_partial(path, each, sums, identity):
    with files.replacing(path) as file:
        np.savez(file, each=each, sums=sums, identity=np.array(identity))


# ---------------------------------------------------------------- coders


def histogram_bits(images: np.ndarray) -> float:
    """Returns bits/dim of uint8 [n, H, W, C] if past values at each position predict the next one.

    The adaptive code of Krichevsky & Trofimov (1981) transmits the images alone. Each level starts with
    a count of 1/2, 1/16 or 1/256, whichever codes best.
    """
    flat = images.reshape(len(images), -1)
    counts = np.stack([np.bincount(column, minlength=256) for column in flat.T])

    def nats(a):
        return (gammaln(len(flat) + 256 * a) - gammaln(256 * a)) * len(counts) - (
            gammaln(counts + a) - gammaln(a)
        ).sum()

    return float(min(map(nats, (1 / 2, 1 / 16, 1 / 256))) / flat.size / math.log(2))


def png_bits(images: np.ndarray) -> float:
    """Returns bits/dim of uint8 [n, H, W, C] as PNG. Up to 1,000 images share a file, so the header costs little.

    Channels other than grey or RGB lie beside each other in a grey file. Signals are rows, and volumes their slices.
    """
    num_bytes = 0
    if images.shape[-1] not in (1, 3):
        images = np.concatenate(np.split(images, images.shape[-1], axis=-1), axis=-2)
    for first in range(0, len(images), 1000):
        some = images[first : first + 1000]
        file = io.BytesIO()
        grids.to_pillow(some.reshape(-1, *some.shape[-2:])).save(file, format="PNG", optimize=True)
        num_bytes += file.tell()
    return 8 * num_bytes / images.size
