"""How good samples are: `metrics` of features of images, with the protocol that makes two numbers comparable.

A feature extractor is features(images uint8 [n, H, W, C]) -> float [n, d], any function; `pixels` is one.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics

MAX_FEATURES = 4096  # of a covariance: 134 MB
MANIFOLD = 10_000  # rows, at most, whose neighbours are looked for: the usual number, and already 10^8 pairs
K, K_DENSITY = 3, 5  # neighbours: of precision and recall, of density and coverage; those of the papers
SUBSETS = 100  # of the kernel distance
DIRECTIONS = 512  # of the sliced Wasserstein distance
_BATCH = 256  # images whose features are computed at once
_COMPARABLE = ("features", "checksum", "image_size", "channels", "resize")  # where protocols must agree


def pixels(images) -> np.ndarray:
    """The values in [−1, 1], flat: float32 [n, H · W · C]."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def protocol(images, name: str, checksum: str, resize: str, origin: str) -> dict:
    """What was measured and how.

    Args:
      images: uint8 [n, H, W, C], or what has its shape.
      name, checksum: of the feature extractor.
      resize: how the images came to their size.
      origin: where they are from.
    """
    n, height, _, channels = images.shape
    return {
        **{"features": name, "checksum": checksum, "image_size": height, "channels": channels, "resize": resize},
        **{"origin": origin, "n": n},
    }


def extracted(images, features: Callable) -> np.ndarray:
    """Features of all images, every one and no more: float32 [n, d]. Batches are padded to one size."""
    return np.concatenate(list(_batches(images, features)))


def _batches(images, features):
    for first in range(0, len(images), _BATCH):
        batch = np.asarray(images[first : first + _BATCH])
        whole = np.concatenate([batch, np.repeat(batch[:1], _BATCH - len(batch), axis=0)])
        yield np.asarray(features(whole), np.float32)[: len(batch)]


def moments(images, features: Callable) -> metrics.Moments:
    """Streamed over the images, which the processes share, with an exact count."""
    total = None
    share = np.array_split(np.arange(len(images)), jax.process_count())[jax.process_index()]
    for batch in _batches(_Chosen(images, share), features):
        total = metrics.Moments.of(batch) if total is None else total.add(batch)
    if jax.process_count() == 1:
        return total
    # In float64 whatever JAX is set to: as bytes.
    raw = np.concatenate([[total.count], total.mean, total.scatter.ravel()]).view(np.uint8)
    parts = [part.view(np.float64) for part in np.asarray(multihost_utils.process_allgather(raw))]
    d = len(total.mean)
    every = [metrics.Moments(int(p[0]), p[1 : d + 1], p[d + 1 :].reshape(d, d)) for p in parts]
    return sum(every[1:], every[0])


class _Chosen:
    """Some of the images."""

    def __init__(self, images, chosen):
        self._images, self._chosen = images, chosen

    def __len__(self):
        return len(self._chosen)

    def __getitem__(self, index):
        return self._images[self._chosen[index]]


def save_statistics(path, found: metrics.Moments, how: dict) -> None:
    """Writes the moments of a set of images with their protocol, .npz."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, count=found.count, mean=found.mean, scatter=found.scatter, protocol=np.array(json.dumps(how)))


def load_statistics(path) -> tuple[metrics.Moments, dict]:
    """What `save_statistics` has written. UserError if it is not that."""
    path = epath.Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            found = metrics.Moments(int(content["count"]), content["mean"], content["scatter"])
            return found, json.loads(str(content["protocol"]))
    except Exception as error:  # zipfile's, NumPy's
        raise UserError(
            f"--reference={path} holds no statistics ({error}): give a file that evaluation wrote"
        ) from None


def check_comparable(how: dict, other: dict) -> None:
    """Raises UserError, naming the keys, if two protocols measure different things."""
    differing = [f"{key}: {how[key]} and {other[key]}" for key in _COMPARABLE if how[key] != other[key]]
    if differing:
        raise UserError(f"numbers of different protocols cannot be compared ({', '.join(differing)}): make both alike")


def frechet_to_statistics(samples, features: Callable, how: dict, reference, reference_how: dict, seed=0) -> dict:
    """The Fréchet distance of samples to saved statistics, as `compare` has it; UserError if the protocols differ.

    The statistics are taken as they are: the interval is that of other samples, not of another reference.
    """
    check_comparable(how, reference_how)
    _check_dimension(next(_batches(samples, features)).shape[1], 0)
    x, rng = extracted(samples, features).astype(np.float64), np.random.default_rng(seed)
    moments = metrics.Moments.of(x)
    distance = metrics.frechet(moments.mean, moments.covariance, reference.mean, reference.covariance)
    settings = {"frechet_95": _interval_settings(x) | {"drawn_again": "samples"}, "seed": seed}
    protocols = {"samples": how, "reference": reference_how, "metrics": settings}
    return {"protocol": protocols, "frechet": distance} | _uncertainty(x, reference, rng)


def compare(samples, reference, features: Callable, seed: int = 0) -> dict:
    """All of `metrics` between two sets of images, and the noise that is in them.

    Args:
      samples, reference: uint8 [n, H, W, C]; whole data sets, not moments.
      features: see above.
      seed: of subsets, directions and draws.

    Returns:
      {"frechet": …, "frechet_95": [low, high], "frechet_extrapolated": [value, standard error] or None where
      there are too few images, "frechet_floor": of one half of the reference to the other,
      "kernel_distance": [mean, standard error], "precision", "recall", "density", "coverage"
      among "neighbours_among": [n of the reference, n of samples], "sliced_wasserstein": …}, and beside these
      "settings", the numbers by which they were made.
    """
    _check_dimension(next(_batches(samples, features)).shape[1], min(len(samples), len(reference)))
    x, y = (extracted(images, features).astype(np.float64) for images in (samples, reference))
    rng = np.random.default_rng(seed)
    half = rng.permutation(len(y))
    result = {"frechet": metrics.frechet_of_features(x, y)} | _uncertainty(x, y, rng)
    result["frechet_floor"] = metrics.frechet_of_features(y[half[::2]], y[half[1::2]])
    subsets = {"num_subsets": SUBSETS, "subset_size": min(1000, len(x), len(y))}
    result["kernel_distance"] = list(metrics.kernel_distance(x, y, rng, **subsets))
    few = [rows[rng.permutation(len(rows))[:MANIFOLD]] for rows in (y, x)]
    result |= metrics.precision_recall(*few, K, K_DENSITY)._asdict() | {"neighbours_among": [len(rows) for rows in few]}
    result["sliced_wasserstein"] = metrics.sliced_wasserstein(x, y, rng, DIRECTIONS)
    result["settings"] = {
        "frechet_95": _interval_settings(x) | {"drawn_again": "samples and reference"},
        "kernel_distance": {"kernel": "(a·b/d + 1)³"} | subsets,
        "precision_recall": {"k": K},
        "density_coverage": {"k": K_DENSITY},
        "sliced_wasserstein": {"num_directions": DIRECTIONS},
        "seed": seed,
    }
    return result


def _uncertainty(x, reference, rng):
    """The interval and the extrapolation of the Fréchet distance of x [n, d] to rows or Moments."""
    interval = metrics.frechet_interval(x, reference, rng, num=_interval_settings(x)["draws"])
    enough = len(x) >= 4 * x.shape[1]
    extrapolated = list(metrics.frechet_extrapolated(x, reference, rng)) if enough else None
    return {"frechet_95": list(interval), "frechet_extrapolated": extrapolated}


def _interval_settings(x):
    return {"method": "bootstrap", "draws": 20 if x.shape[1] > 1000 else 200}


def _check_dimension(d, n):
    if d > MAX_FEATURES and not 0 < n <= d:
        raise UserError(
            f"{d} features are more than the {MAX_FEATURES} of which a covariance is made: give --inception, which has "
            "2048, for images of this size"
        )


def read_samples(path) -> np.ndarray:
    """The images that `--mode=sample` has written as an .npz or as shards in a folder: uint8 [n, H, W, C].

    Raises:
      UserError: no such file, or no images in it.
    """
    path = epath.Path(path)
    files = sorted(path.glob("*-*.npz")) if path.is_dir() else [path]
    try:
        parts = []
        for file in files:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
                parts.append(content["arr_0"])
        found = np.concatenate(parts)
    except Exception as error:  # NumPy's, zipfile's, no file
        raise UserError(
            f"--samples={path} holds no samples ({error}): give an .npz or a folder that --mode=sample wrote"
        ) from None
    if found.ndim != 4 or found.dtype != np.uint8 or not len(found):
        raise UserError(f"--samples={path} holds {found.dtype} {found.shape}, not images uint8 [n, H, W, C]")
    return found


def read_about(path) -> dict | str:
    """What made the images that `--mode=sample` has written to `path`; "unknown" where that does not say so."""
    path = epath.Path(path)
    try:
        if path.is_dir():
            return json.loads((path / "samples.json").read_text())
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            return json.loads(str(content["about"]))
    except (OSError, ValueError, KeyError):
        return "unknown"
