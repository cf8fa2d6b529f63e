"""The likelihood bound of each image of a data set, and simple coders for comparison."""

import functools
import io
import math
from collections.abc import Callable

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from scipy.special import gammaln

from diffusion_jax import likelihood, sampling
from diffusion_jax.data import pixels
from diffusion_jax.data.cache import Cached, OnTheFly
from diffusion_jax.errors import one_line
from diffusion_jax.parts import Parts
from diffusion_jax.pictures import grids
from diffusion_jax.running import files

MANY = 10_000  # largest number of images for the coders


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
) -> dict:
    """Measures the images at the indices `chosen` of one split.

    Args:
      sigma: [T + 1] deviations of the reverse steps in the bound.
      chosen: int [n], sorted.
      batch_size: images at a time over all devices.
      partial: a file of intermediate results; a second call with the same `identity` resumes from it.
      identity: a digest of everything that the numbers depend on.
      with_labels: True gives the network the class of each image, for p(x | y); False is p(x), or p(x | ∅).

    Returns:
      Means over the images: bits_per_dim with its standard_error, prior, decoder, rate (bits/dim), distortion
      (root mean square error, scale 0..255), loss (15), the loss and the rate-distortion curve by t, and the
      bits/dim of two simple coders.
    """
    each, sums = _bound(run, sigma, params, dataset, chosen, seed, batch_size, partial, identity, with_labels)
    n, (total, prior, decoder, squared_error) = len(chosen), each.mean(axis=0)
    terms, squared_errors, losses = sums / n
    rate, distortion = likelihood.rate_distortion(prior, terms, squared_errors)
    ts = list(range(1, len(terms) + 1))
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
        "loss": float(losses.mean()),
        "loss_by_t": {"t": ts, "loss": _short(losses)},
        "rate_distortion": {"t": ts, "rate": _short(rate), "distortion": _short(distortion)},
    }


def _short(values):
    return [float(f"{value:.6g}") for value in values]


def _bound(run, sigma, params, dataset, chosen, seed, batch_size, partial, identity, with_labels):
    """Returns (each [n, 4]: total, prior, decoder, squared error of t = 1; sums [3, T] of `vlb_by_step` over images).

    The file `partial` keeps both after every batch. Image i draws its noise from (seed, i) alone, so the
    numbers do not depend on devices or processes, up to rounding.
    """
    processes, devices = jax.process_count(), jax.local_device_count()
    per_device = max(1, batch_size // (processes * devices))
    batch = per_device * devices * processes
    each, sums = _read_partial(partial, identity, len(chosen), run.schedule.num_steps)
    bound, params, rng = _bound_fn(run, sigma), jax.device_put(params), jax.random.key(seed)
    if processes > 1:
        multihost_utils.sync_global_devices("read")  # before process 0 writes
    with tqdm.tqdm(
        total=len(chosen), initial=len(each), unit="image", desc=partial.stem, disable=jax.process_index() != 0
    ) as bar:
        for first in range(len(each), len(chosen), batch):
            wanted = chosen[first : first + batch]
            padded = np.resize(wanted, batch).reshape(processes, devices, per_device)[jax.process_index()]
            batch_of = _examples(dataset, padded, with_labels)
            arrays = jax.device_get(bound(params, rng, batch_of, padded))  # [D, B], [D, B, T] thrice
            if processes > 1:
                arrays = multihost_utils.process_allgather(arrays)
            prior, *by_step = (np.float64(x).reshape(batch, *x.shape[arrays[0].ndim :])[: len(wanted)] for x in arrays)
            by_step = np.stack(by_step)
            terms, squared_errors, _ = by_step
            new = np.stack([prior + terms.sum(axis=1), prior, terms[:, 0], squared_errors[:, 0]], axis=1)
            each, sums = np.concatenate([each, new]), sums + by_step.sum(axis=1)
            if jax.process_index() == 0:
                _write_partial(partial, each, sums, identity)
            bar.update(len(wanted))
    return each, sums


def _bound_fn(run: Parts, sigma: jax.Array) -> Callable:
    """Returns (params, rng, a batch [D, B, …], indices [D, B]) -> prior [D, B] and three [D, B, T]."""

    def bound(params, rng, batch, indices):
        x_0, keys = pixels.from_uint8(batch["image"]), sampling.image_keys(rng, indices)
        labels = {"labels": batch["label"]} if "label" in batch else {}
        eps_bar_fn = functools.partial(run.network, {"params": params}, **labels)
        prior = likelihood.prior_kl(run.schedule, x_0).mean(axis=(1, 2, 3)) / math.log(2)
        by_step = likelihood.vlb_by_step(eps_bar_fn, run.schedule, sigma, x_0, keys, clip=run.clip)
        return prior, *(x.T for x in by_step)

    return jax.pmap(bound, in_axes=(None, None, 0, 0))


def _examples(dataset, indices, with_labels):
    """Returns the images at indices [D, B] as {"image": [D, B, H, W, C]}, and their "label" [D, B] where asked."""
    if not with_labels:
        return {"image": dataset[indices]}
    return {name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in dataset.examples(indices.ravel()).items()}


def _read_partial(path, identity, num, num_steps):
    """Returns the content of the file, or empty arrays if it is missing, damaged or of another identity."""
    empty = np.zeros((0, 4)), np.zeros((3, num_steps))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            if str(content["identity"]) != identity:
                return empty
            each, sums = content["each"], content["sums"]
        if each.shape != (min(len(each), num), 4) or sums.shape != (3, num_steps):
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
    """Returns bits/dim of uint8 [n, H, W, C] as PNG. Up to 1,000 images share a file, so the header costs little."""
    num_bytes = 0
    for first in range(0, len(images), 1000):
        some = images[first : first + 1000]
        file = io.BytesIO()
        grids.to_pillow(some.reshape(-1, *some.shape[2:])).save(file, format="PNG", optimize=True)
        num_bytes += file.tell()
    return 8 * num_bytes / images.size
