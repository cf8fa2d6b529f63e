"""The quality of samples: `metrics` of image features, with the protocol that makes two numbers comparable.

A feature extractor is any function features(images uint8 [n, H, W, C]) -> float [n, d], for example `pixels`.
Images are uint8 [n, H, W, C]: an array, or an object with its shape, length and indexing.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.data.pixels import from_uint8
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.evaluation import metrics
from diffusion_jax.running import files
from diffusion_jax.running.watch import waiting

MAX_FEATURES = 4096  # number of features in the largest covariance, 134 MB
MAX_NEIGHBOURS = 10_000  # rows whose neighbours are searched, as is usual: 10^8 pairs
K, K_DENSITY = 3, 5  # neighbours for precision and recall, and for density and coverage, as in the papers
FLOORS = 4  # cuts of the reference whose parts are compared
SUBSETS = 100  # in the kernel distance
DIRECTIONS = 512  # in the sliced Wasserstein distance
_JACKKNIFE = {"method": "infinitesimal jackknife"}
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")  # endings of files that are no samples, though they show some
_BATCH = 256  # images in a call of the feature extractor
_COMPARABLE = ("features", "checksum", "image_size", "channels", "resize")  # keys that must be equal in both protocols

Features = Callable[[np.ndarray], Any]  # a feature extractor


def pixels(images: np.ndarray) -> np.ndarray:
    """Returns the pixel values in [−1, 1] as float32 [n, H · W · C]."""
    return from_uint8(images.reshape(len(images), -1))


def protocol(images: Any, name: str, checksum: str, resize: str, origin: str) -> dict[str, Any]:
    """Returns the protocol of a measurement: the images and how their features are computed.

    Args:
      images: uint8 [n, H, W, C]; only the shape is read.
      name: name of the feature extractor.
      checksum: checksum of the feature extractor's weights.
      resize: the method that resized the images.
      origin: the file or the data set.
    """
    n, *size, channels = images.shape
    size = size[0] if size == [size[0]] * 2 else size
    settings = {"features": name, "checksum": checksum, "image_size": size, "channels": channels, "resize": resize}
    return settings | {"origin": origin, "n": n}


def extract(images: Any, features: Features) -> np.ndarray:
    """Returns the features of all images, float32 [n, d]. Batches are padded to one size."""
    return np.concatenate(list(_batches(images, features)))


def _batches(images, features, indices=None):
    """Yields the float32 features of each batch of images (those at `indices`), without those of the padding."""
    indices = np.arange(len(images)) if indices is None else indices
    quiet = jax.process_index() != 0
    for first in tqdm.tqdm(range(0, len(indices), _BATCH), desc="features", delay=2, leave=False, disable=quiet):
        batch = np.asarray(images[indices[first : first + _BATCH]])
        padded = np.concatenate([batch, np.repeat(batch[:1], _BATCH - len(batch), axis=0)])
        yield np.asarray(features(padded), np.float32)[: len(batch)]


def moments(images: Any, features: Features) -> metrics.Moments:
    """Returns the moments of the features of all images, in every process; each process reads its share."""
    share = np.array_split(np.arange(len(images)), jax.process_count())[jax.process_index()]
    batches = _batches(images, features, share)
    total = metrics.Moments.of(next(batches))
    for batch in batches:
        total = total.add(batch)
    if jax.process_count() == 1:
        return total
    # Sent as bytes: JAX would round float64 unless jax_enable_x64 is set.
    raw = np.concatenate([[total.count], total.mean, total.scatter.ravel()]).view(np.uint8)
    parts = [part.view(np.float64) for part in np.asarray(multihost_utils.process_allgather(raw))]
    d = len(total.mean)
    totals = [metrics.Moments(int(p[0]), p[1 : d + 1], p[d + 1 :].reshape(d, d)) for p in parts]
    return sum(totals[1:], totals[0])


def save_statistics(path: epath.PathLike, statistics: metrics.Moments, protocol: dict[str, Any]) -> None:
    """Writes the moments of a set of images and their protocol as an .npz file."""
    about = np.array(json.dumps(protocol))
    with files.replacing(path) as file:
        np.savez(file, count=statistics.count, mean=statistics.mean, scatter=statistics.scatter, protocol=about)


def load_statistics(path: epath.PathLike) -> tuple[metrics.Moments, dict[str, Any]]:
    """Returns the moments and the protocol that `save_statistics` wrote.

    Raises:
      UserError: the file is missing, or has other content.
    """
    path = epath.Path(path).expanduser()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            mean, scatter = (np.asarray(content[name], np.float64) for name in ("mean", "scatter"))
            statistics = metrics.Moments(int(content["count"]), mean, scatter)
            protocol = json.loads(str(content["protocol"]))
        if statistics.count < 2 or not isinstance(protocol, dict) or not {*_COMPARABLE} <= {*protocol}:
            raise ValueError(f"{statistics.count} rows, protocol {protocol}")
    except Exception as error:  # NumPy and zipfile raise many types
        raise UserError(
            f"--reference={path} holds no statistics ({one_line(error, 200)}): give a statistics-….npz file from "
            "--mode=evaluate"
        ) from None
    return statistics, protocol


def check_comparable(protocol: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises UserError, naming the keys, if two protocols measure different things."""
    differing = [f"{key}: {protocol[key]} and {other[key]}" for key in _COMPARABLE if protocol[key] != other[key]]
    if differing:
        raise UserError(
            f"numbers of different protocols cannot be compared ({', '.join(differing)}): use the same settings"
        )


def frechet_to_statistics(
    samples: Any,
    features: Features,
    samples_protocol: dict[str, Any],
    reference: metrics.Moments,
    reference_protocol: dict[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the Fréchet distance of samples to saved statistics, with the keys of `compare`.

    The statistics are fixed: the standard error is over new samples, not over a new reference.

    Args:
      samples: uint8 [n, H, W, C].
      features: the feature extractor.
      samples_protocol: protocol of the samples.
      reference: the saved moments.
      reference_protocol: protocol of the saved moments.
      seed: seed of the subsets of the extrapolation.

    Raises:
      UserError: the protocols differ, there are too few samples or too many features.
    """
    check_comparable(samples_protocol, reference_protocol)
    check_sizes(len(reference.mean), len(samples), None)
    x, rng = extract(samples, features).astype(np.float64), np.random.default_rng(seed)
    moments = metrics.Moments.of(x)
    measures: dict[str, Callable] = {
        "frechet": lambda: metrics.frechet(moments.mean, moments.covariance, reference.mean, reference.covariance)
    }
    settings = {"frechet_standard_error": _JACKKNIFE | {"over": "new samples"}, "seed": seed}
    settings |= {"frechet_extrapolated": {"left_out": _too_few(x)}} if _too_few(x) else {}
    protocols = {"samples": samples_protocol, "reference": reference_protocol, "metrics": settings}
    return {"protocol": protocols} | _measured(measures | _uncertainty(x, reference, rng))


def compare(samples: Any, reference: Any, features: Features, seed: int = 0) -> dict[str, Any]:
    """Returns all `metrics` between two sets of images, and their uncertainty.

    Args:
      samples: uint8 [n, H, W, C].
      reference: uint8 [m, H, W, C], the whole data set and not its moments.
      features: the feature extractor.
      seed: seed of the halves, the subsets and the directions.

    Returns:
      {"frechet": …, "frechet_standard_error": over new sets of the same sizes, "frechet_extrapolated": [value,
      standard error], or None with too few images, "frechet_floor": [mean, standard deviation] over FLOORS cuts of the
      reference in two, of which the first has as many rows as the samples, but at most half, "frechet_at_floor_size":
      the same for as many samples in place of the first, "kernel_distance": [mean, standard error], "precision",
      "recall", "density" and "coverage" among "neighbours_among": [rows of the reference, rows of the samples],
      "sliced_wasserstein": …, "settings": the settings of the metrics}.

    Raises:
      UserError: there are too few images or too many features.
    """
    x, rng = extract(samples, features).astype(np.float64), np.random.default_rng(seed)
    d = x.shape[1]
    check_sizes(d, len(samples), len(reference))
    y = extract(reference, features).astype(np.float64)
    rows = min(len(x), len(y) // 2, *([] if d <= MAX_FEATURES else [MAX_FEATURES]))  # no larger covariance is needed
    subsets = {"num_subsets": SUBSETS, "subset_size": min(1000, len(x), len(y))}
    real, fake = (rows[rng.permutation(len(rows))[:MAX_NEIGHBOURS]] for rows in (y, x))
    measures: dict[str, Callable] = {"frechet": lambda: metrics.frechet_of_features(x, y)} | _uncertainty(x, y, rng)
    result = _measured(
        measures
        | {
            "frechet_floor": lambda: _floor(x, y, rows, rng),
            "kernel_distance": lambda: list(metrics.kernel_distance(x, y, rng, **subsets)),
            "precision_recall": lambda: metrics.precision_recall(real, fake, K, K_DENSITY)._asdict(),
            "sliced_wasserstein": lambda: metrics.sliced_wasserstein(x, y, rng, DIRECTIONS),
        }
    )
    result |= result.pop("frechet_floor")
    result |= result.pop("precision_recall") | {"neighbours_among": [len(real), len(fake)]}
    result["settings"] = {
        "frechet_standard_error": _JACKKNIFE | {"over": "new samples and reference"},
        "frechet_floor": {"rows": [rows, len(y) - rows], "cuts": FLOORS},
        **({"frechet_extrapolated": {"left_out": _too_few(x)}} if _too_few(x) else {}),
        "kernel_distance": {"kernel": "(a·b/d + 1)³"} | subsets,
        "precision_recall": {"k": K},
        "density_coverage": {"k": K_DENSITY},
        "sliced_wasserstein": {"num_directions": DIRECTIONS},
        "seed": seed,
    }
    return result


def _uncertainty(x, reference, rng):
    """Returns the functions that measure the error and the extrapolation of `frechet`, x [n, d] to rows or Moments."""
    return {
        "frechet_standard_error": lambda: metrics.frechet_standard_error(x, reference),
        "frechet_extrapolated": lambda: None if _too_few(x) else list(metrics.frechet_extrapolated(x, reference, rng)),
    }


def _too_few(x):
    """Returns why there is no extrapolation from x [n, d]; "" if there is one."""
    (n, d), least = x.shape, metrics.EXTRAPOLATED * x.shape[1]
    if d > MAX_FEATURES:
        return f"{d:,} features are more than the {MAX_FEATURES:,} of a covariance: give --inception"
    return (
        ""
        if n >= least
        else f"{n:,} samples of {d:,} features are fewer than {least:,}, {metrics.EXTRAPOLATED} for each"
    )


def _floor(x, y, rows, rng):
    """Returns the distances of `rows` rows of y, and of x, to the other rows of y; see `compare`."""
    real, fake = [], []
    for _ in range(FLOORS):
        first, rest = np.split(rng.permutation(len(y)), [rows])
        real.append(metrics.frechet_of_features(y[first], y[rest]))
        fake.append(metrics.frechet_of_features(x[rng.permutation(len(x))[:rows]], y[rest]))
    names = {"frechet_floor": real, "frechet_at_floor_size": fake}
    return {name: [float(np.mean(values)), float(np.std(values, ddof=1))] for name, values in names.items()}


def _measured(measures):
    """Returns {name: measure()}, and shows the name of the measure that is running."""
    result = {}
    with tqdm.tqdm(measures.items(), desc="metrics", leave=False, disable=jax.process_index() != 0) as bar:
        for name, measure in bar:
            result[name] = waiting(name.replace("_", " "), measure)
    return result


def check_sizes(d: int, num_samples: int, num_reference: int | None) -> None:
    """Raises UserError if sets of these sizes with d features cannot be compared; None is for saved statistics."""
    least = 2 if num_reference is None else K + 1
    if num_samples < least:
        raise UserError(f"--samples holds {num_samples} images, too few to compare: give at least {least}")
    if num_reference is not None and num_reference <= K_DENSITY:
        raise UserError(
            f"--samples cannot be compared with {num_reference} images: give a split of at least {K_DENSITY + 1}"
        )
    if d > MAX_FEATURES and (num_reference is None or min(num_samples, num_reference) > d):
        raise UserError(
            f"{d} features are more than the {MAX_FEATURES} of the largest covariance: for images of this size give "
            "--inception, which has 2048 features"
        )


def read_samples(path: epath.PathLike) -> np.ndarray:
    """Returns the images that `--mode=sample` wrote as an .npz file or as shards in a folder, uint8 [n, H, W, C].

    Raises:
      UserError: the file is missing, or holds no images.
    """
    return np.concatenate([images for images, _ in _read_shards(path)])


def read_labels(path: epath.PathLike, num_classes: int) -> np.ndarray | None:
    """Returns the class of each image of `read_samples`, int [n]; `num_classes` means none. None if a file has none.

    Raises:
      UserError: the labels are not one class for each image.
    """
    shards = _read_shards(path)
    if any(labels is None for _, labels in shards):
        return None
    for images, labels in shards:
        is_integer = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if not (is_integer and labels.min() >= 0 and labels.max() <= num_classes):
            raise UserError(
                f"--samples={path} holds labels {labels.dtype} {labels.shape}, not a class in 0..{num_classes} for "
                "each image: give samples of this run"
            )
    return np.concatenate([labels for _, labels in shards]).astype(int)


def _read_shards(path):
    """Returns (images, labels or None) of each file."""
    path = epath.Path(path).expanduser()
    # A longer shard replaces a shorter one of the same start, which a kill may have left.
    shards = (
        {shard.name.split("-")[0]: shard for shard in sorted(path.glob("*-*.npz"))} if path.is_dir() else {"": path}
    )
    arrays, remedy = [], "give an .npz or a folder that --mode=sample wrote"
    for file in shards.values():
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
                arrays.append((content["arr_0"], content.get("labels")))
        except Exception as error:  # NumPy and zipfile raise many types
            reason = f"it is a picture, {file.suffix}" if file.suffix in PICTURES else one_line(error, 200)
            raise UserError(f"--samples={file} holds no samples ({reason}): {remedy}, e.g. --out=samples.npz") from None
    for array, _ in arrays or [(np.zeros(0), None)]:
        shape = array.shape[1:]
        if not 2 <= len(shape) <= 4 or array.dtype != np.uint8 or not len(array) or shape != arrays[0][0].shape[1:]:
            raise UserError(
                f"--samples={path} holds {array.dtype} {array.shape}, not images uint8 [n, H, W, C]: {remedy}"
            )
    return arrays


def read_about(path: epath.PathLike) -> dict[str, Any] | str:
    """Returns the settings that `--mode=sample` stored with the samples at `path`, or "unknown" if there are none."""
    path = epath.Path(path).expanduser()
    try:
        if path.is_dir():
            about = json.loads((path / "samples.json").read_text())
        else:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
                about = json.loads(str(content["about"]))
    except Exception:  # NumPy and zipfile raise many types, JSON that is nested too deeply RecursionError
        return "unknown"
    return about if isinstance(about, dict) else "unknown"
