"""The numbers of a run for a table: bits/dim, rate and distortion, the loss by t, and the quality of samples.

Everything goes to <workdir>/evaluation/<step>/: evaluation.json for machines, evaluation.md for people.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from scipy.special import gammaln

from diffusion_jax import from_config, likelihood, sample, schedule
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import inception, metrics, monitor, quality
from diffusion_jax.evaluation.report import report
from diffusion_jax.pictures import grids
from diffusion_jax.pictures.shows import show
from diffusion_jax.running import checkpoint

_SECTIONS = {"samples": "Samples", "samples_to_statistics": "Samples against saved statistics"}
MANY = 10_000  # images, at most, that PNG and histograms code, and held-out ones whose neighbours are looked for


def evaluate(
    workdir,
    *,
    seed: int = 0,
    num: int | None = None,
    splits: tuple[str, ...] = (),
    samples: str = "",
    inception_path: str = "",
    reference: str = "",
) -> dict:
    """Evaluates the last checkpoint of a run; goes on where an evaluation with the same arguments was stopped.

    Args:
      seed: of the noise, and of the choice of images.
      num: images of each split, drawn without repetition; None: all.
      splits: of the data set; default: config.data.split and config.data.test_split.
      samples: what --mode=sample has written, to be compared with the first split; "": likelihood alone.
      inception_path: weights of Inception v3, see `inception`; "": the features are pixels.
      reference: statistics that another evaluation has saved, to be compared with in place of a split.

    Returns:
      What evaluation.json holds.

    Raises:
      UserError: no run, no checkpoint, no such split; samples or statistics that cannot be used.
    """
    if num is not None and num < 1:
        raise UserError(f"--num={num} must be at least 1")
    config = sample.read_config(workdir)
    splits = splits or tuple(filter(None, (config.data.split, config.data.test_split)))
    extractor = _extractor(inception_path)
    generated = quality.read_samples(samples) if samples else None
    saved = quality.load_statistics(reference) if reference else None
    if reference and generated is None:
        raise UserError(f"--reference={reference} is to be compared with --samples: give them")
    datasets = {split: _images(config, workdir, split) for split in splits}
    step, params = sample.ema_params(config, workdir)
    folder = checkpoint.absolute(workdir) / "evaluation" / str(step)
    main = jax.process_index() == 0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    result = {"step": step, "seed": seed, "protocol": _protocol(config, seed), "splits": {}}
    result |= _of_earlier(folder)
    for split, dataset in datasets.items():
        chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num])
        result["splits"][split] = _of_split(config, params, dataset, chosen, seed, folder / f"bound-{_stem(split)}.npz")
    if generated is not None:
        section = "samples" if saved is None else "samples_to_statistics"
        result[section] = _of_samples(config, generated, samples, datasets, extractor, saved, seed, folder)
    if main:
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "evaluation.md").write_text(markdown(result))
        print(markdown(result) + f"\n{folder / 'evaluation.json'}")
    show(workdir, "progressive", seed, str(folder / "progressive.png"))
    if main:
        report(workdir)
    return result


def _of_earlier(folder):
    """What an earlier evaluation of the step has found of samples, which this one replaces only by its like."""
    try:
        earlier = json.loads((folder / "evaluation.json").read_text())
        return {name: earlier[name] for name in _SECTIONS if name in earlier}
    except (OSError, ValueError):
        return {}


def _stem(split):
    return "".join(c if c.isalnum() else "-" for c in split).strip("-")


def _images(config, workdir, split):
    config = config.copy_and_resolve_references()
    config.data.split = split
    return sample.read_images(config, workdir)


def _deviations(config):
    """The reverse variance of the bound, which the greedy one has not: name and sigma [T + 1]."""
    s = from_config.schedule(config)
    if config.sampling.sigma == "zero":
        return "posterior", schedule.sigma_posterior(s)
    return config.sampling.sigma, from_config.sigma(config)


def _protocol(config, seed):
    clip = from_config.clip(config)
    return {
        "bound": "bits/dim by the variational bound over all steps, one draw of noise for each image and step",
        "parameters": "EMA",
        "sigma": _deviations(config)[0],
        "clip": None if clip is None else list(clip),
        "decoder": "exact",
        "decoder_std": float(likelihood.default_decoder_std(from_config.schedule(config))),
        "decoder_std_is": "posterior sigma of t = 2",
        "T": config.schedule.num_steps,
        "seed": seed,
    }


# ---------------------------------------------------------------- the bound


def _of_split(config, params, dataset, chosen, seed, partial):
    """What is said of one split, from the images numbered `chosen`."""
    each, sums = _bound(config, params, dataset, chosen, seed, partial)
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


def _bound(config, params, dataset, chosen, seed, partial):
    """(each [n, 4]: total, prior, decoder, squared error of t = 1; sums [3, T] over the images of `vlb_by_step`).

    All is kept in the file `partial` after every batch. Image i draws its noise from (seed, i) alone: the
    numbers do not depend on devices or processes, up to rounding.
    """
    processes, devices = jax.process_count(), jax.local_device_count()
    per_device = max(1, config.train.batch_size // (processes * devices))
    batch = per_device * devices * processes
    bound, params, rng = _bound_fn(config), jax.device_put(params), jax.random.key(seed)
    identity = _identity(config, params, chosen, seed)
    each, sums = _read_partial(partial, identity, config.schedule.num_steps)
    if processes > 1:
        multihost_utils.sync_global_devices("read")  # before process 0 writes
    with tqdm.tqdm(
        total=len(chosen), initial=len(each), unit="image", desc=partial.stem, disable=jax.process_index() != 0
    ) as bar:
        for first in range(len(each), len(chosen), batch):
            wanted = chosen[first : first + batch]
            padded = np.resize(wanted, batch).reshape(processes, devices, per_device)[jax.process_index()]
            found = jax.device_get(bound(params, rng, dataset[padded], padded))  # [D, B], [D, B, T] thrice
            if processes > 1:
                found = multihost_utils.process_allgather(found)
            prior, *by_step = (np.float64(x).reshape(batch, *x.shape[found[0].ndim :])[: len(wanted)] for x in found)
            by_step = np.stack(by_step)
            terms, squared_errors, _ = by_step
            new = np.stack([prior + terms.sum(axis=1), prior, terms[:, 0], squared_errors[:, 0]], axis=1)
            each, sums = np.concatenate([each, new]), sums + by_step.sum(axis=1)
            if jax.process_index() == 0:
                _write_partial(partial, each, sums, identity)
            bar.update(len(wanted))
    return each, sums


def _bound_fn(config):
    """(params, rng, pixels uint8 [D, B, H, W, C], indices [D, B]) -> prior [D, B], and [D, B, T] thrice; pmapped."""
    apply_fn, s, (_, sigma) = from_config.network(config), from_config.schedule(config), _deviations(config)
    clip = from_config.clip(config)

    def bound(params, rng, pixels, indices):
        x_0 = pixels.astype(jnp.float32) / 127.5 - 1
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        eps_bar_fn = functools.partial(apply_fn, {"params": params})
        prior = likelihood.prior_kl(s, x_0).mean(axis=(1, 2, 3)) / math.log(2)
        by_step = likelihood.vlb_by_step(eps_bar_fn, s, sigma, x_0, keys, clip=clip)
        return prior, *(x.T for x in by_step)

    return jax.pmap(bound, in_axes=(None, None, 0, 0))


def _identity(config, params, chosen, seed):
    """Of everything that the numbers depend on."""
    what = [config.to_dict(), checkpoint.checksums(params), chosen.tolist(), seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _read_partial(path, identity, num_steps):
    """What is done already; nothing if the file is of something else."""
    if path.exists():
        with path.open("rb") as file, np.load(file) as content:
            if str(content["identity"]) == identity:
                return content["each"], content["sums"]
    return np.zeros((0, 4)), np.zeros((3, num_steps))


def _write_partial(path, each, sums, identity):
    beside = path.with_name(f"{path.name}.partial")
    with beside.open("wb") as file:
        np.savez(file, each=each, sums=sums, identity=np.array(identity))
    beside.replace(path)


# ---------------------------------------------------------------- coders to compare with


def histogram_bits(pixels) -> float:
    """Bits/dim of uint8 [n, H, W, C] when each position is coded by the histogram of what was seen there so far.

    An adaptive code, Krichevsky & Trofimov (1981): nothing needs to be sent but the images. Each level counts
    a part of an image beforehand, the best of 1/2, 1/16 and 1/256.
    """
    flat = pixels.reshape(len(pixels), -1)
    counts = np.stack([np.bincount(column, minlength=256) for column in flat.T])

    def nats(a):
        return (gammaln(len(flat) + 256 * a) - gammaln(256 * a)) * len(counts) - (
            gammaln(counts + a) - gammaln(a)
        ).sum()

    return float(min(map(nats, (1 / 2, 1 / 16, 1 / 256))) / flat.size / math.log(2))


def png_bits(pixels) -> float:
    """Bits/dim of uint8 [n, H, W, C] as PNG, many below one another in a file, so that its head costs little."""
    num_bytes = 0
    for first in range(0, len(pixels), 1000):
        some = pixels[first : first + 1000]
        file = io.BytesIO()
        grids.to_pillow(some.reshape(-1, *some.shape[2:])).save(file, format="PNG", optimize=True)
        num_bytes += file.tell()
    return 8 * num_bytes / pixels.size


# ---------------------------------------------------------------- samples


def _extractor(path):
    """(name, checksum, features) of pixels, or of Inception v3 if a path is given."""
    if not path:
        return "pixels", "", quality.pixels
    features, checksum = inception.load_features(path)
    return "inception-2015-12-05", checksum, features


def _of_samples(config, generated, path, datasets, extractor, saved, seed, folder):
    """The quality of samples against the first split, or against saved statistics; nearest training images."""
    name, checksum, features = extractor
    split, dataset = next(iter(datasets.items()))
    resize = f"bicubic, antialiased, centre crop {config.data.crop or 'of the largest square'}"
    describe = functools.partial(quality.protocol, name=name, checksum=checksum, resize=resize)
    how = describe(generated, origin=path) | {"made_by": quality.read_about(path)}
    if generated.shape[1:] != dataset.shape[1:]:
        raise UserError(f"--samples={path} holds images of {generated.shape[1:]}, the run's are {dataset.shape[1:]}")
    if saved is not None:
        return quality.frechet_to_statistics(generated, features, how, *saved, seed)
    data_how = describe(dataset, origin=f"{config.data.source} {config.data.path} {split}".replace("  ", " "))
    found = quality.compare(generated, dataset, features, seed)
    nearest, nearest_how = _nearest(generated, datasets, folder)
    settings = found.pop("settings") | {"nearest_training_image": nearest_how}
    found = {"protocol": {"samples": how, "reference": data_how, "metrics": settings}} | found
    if dataset.shape[1] ** 2 * dataset.shape[3] <= quality.MAX_FEATURES or name != "pixels":
        statistics = quality.moments(dataset, features)
        if jax.process_index() == 0:
            quality.save_statistics(folder / f"statistics-{name}-{_stem(split)}.npz", statistics, data_how)
    return found | {"nearest_training_image": nearest}


def _nearest(generated, datasets, folder):
    """How far samples are from their nearest training image, of a held-out split the same, as a yardstick; and how."""
    train, *others = datasets.values()
    distance, index = metrics.nearest(quality.pixels(generated), _Pixels(train))
    found = {"median": float(np.median(distance)), "least": float(distance.min())}
    how = {"distance": "Euclidean, all pixels, in [-1, 1]", "n": len(generated), "training_images": len(train)}
    if others:
        held_out = others[0][:MANY]
        found["median_of_held_out"] = float(np.median(metrics.nearest(quality.pixels(held_out), _Pixels(train))[0]))
        how["held_out_images"] = len(held_out)
    if jax.process_index() == 0:
        grids.save_png(folder / "nearest.png", monitor.nearest_pairs(generated, train, index, distance))
    return found, how


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """The rows of `quality.pixels` of a data set, made where they are asked for."""

    images: Any

    @property
    def shape(self):
        return len(self.images), math.prod(self.images.shape[1:])

    def __getitem__(self, rows):
        return quality.pixels(self.images[rows])


# ---------------------------------------------------------------- for people


def markdown(result: dict) -> str:
    """The numbers of evaluation.json as Markdown."""
    protocol = result["protocol"]
    lines = [f"# Evaluation of step {result['step']}", ""]
    names = ("n", "bits_per_dim", "standard_error", "rate", "distortion", "prior", "loss")
    names += ("histogram_bits_per_dim", "png_bits_per_dim")
    lines += _table(["split", *names], [[split, *(x[name] for name in names)] for split, x in result["splits"].items()])
    lines += [
        "",
        f"Bits/dim by the variational bound over T = {protocol['T']} steps; sigma {protocol['sigma']}, x_0 clipped to "
        f"{protocol['clip']}, {protocol['decoder']} decoder of deviation {protocol['decoder_std']:.4g} "
        f"({protocol['decoder_std_is']}), {protocol['parameters']} parameters, seed {protocol['seed']}, one draw of "
        "noise for each image and step. Standard error over images. Distortion: root mean square error, scale 0..255.",
    ]
    for split, x in result["splits"].items():
        t, rate, distortion = (np.array(x["rate_distortion"][name]) for name in ("t", "rate", "distortion"))
        shown = np.unique(np.linspace(0, len(t) - 1, 11).round().astype(int))[::-1]
        lines += ["", f"## Progressive coding, {split}", ""]
        rows = [[t[i], rate[i], distortion[i], x["loss_by_t"]["loss"][i]] for i in shown]
        lines += _table(["t", "rate, bits/dim", "distortion", "loss (15)"], rows)
    for section in [name for name in _SECTIONS if name in result]:
        found = dict(result[section])
        how = found.pop("protocol")
        lines += ["", f"## {_SECTIONS[section]}", ""]
        lines += _table(["", "value"], found.items())
        lines += ["", *(f"- {name}: {'; '.join(f'{k}: {_cell(v)}' for k, v in x.items())}" for name, x in how.items())]
    return "\n".join(lines) + "\n"


def _table(head, rows):
    rows = [[_cell(value) for value in row] for row in rows]
    return [" | ".join(["", *row, ""]).strip() for row in (map(str, head), ["---"] * len(head), *rows)]


def _cell(value):
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(x)}" for name, x in value.items())
    return str(value)
