"""The images of a run, decoded into their cache before it starts, with what they are."""

import math
import time
from collections.abc import Iterator

import numpy as np
import tqdm
from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.data import pixels, summary
from diffusion_jax.data.cache import Cached, OnTheFly
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import grids
from diffusion_jax.running import config as configs
from diffusion_jax.running import files

PICTURES = 16  # images of the grid, 4 × 4
SUBSET = 1000  # images decoded on the fly to look at: seconds to a minute, and a share is right to about 3%
LISTED = 20  # classes that are listed one by one
BLOCK = 1 << 24  # bytes of images read at once


def prepare(config: ConfigDict, out: str = "prepared.png") -> None:
    """Makes the cache of a config's data set, prints what the images are, and draws some.

    Prints a line that begins with "warning: " for each thing that looks like a mistake, see `summary.warnings`.

    Args:
      out: the .png file of a grid of PICTURES images.

    Raises:
      UserError: `out` cannot be written; see also `sources.open_source` and `cache.open_images`.
    """
    configs.check(config)
    path = epath.Path(out).expanduser()
    _check(out, path)
    start = time.monotonic()
    images = parts.images(config)
    count, *shape = images.shape
    print(f"{count:,} images, {'x'.join(map(str, shape))}, ready in {time.monotonic() - start:.1f} s")
    print(_storage(images))
    indices = _looked_at(images)
    found = summary.summarize(_batches(images, indices))
    counts = {} if found.labels is None else summary.class_counts(found.labels, images.classes)
    print(_text(found, counts, count))
    if images.dtype != np.uint8:
        print(f"  0..255 are 256 levels of config.data.range={tuple(config.data.range)}")
    has_alpha, has_range = not images.array_dtype and shape[-1] == 4, bool(config.data.range)
    complete = counts if found.num == count else {}
    for text in summary.warnings(found, complete, has_alpha=has_alpha, has_range=has_range):
        print(f"warning: {text}")
    chosen = indices[summary.spread(found.num, found.labels, PICTURES)]
    x = pixels.to_uint8(images.examples(chosen)["image"])
    grids.save_png(path, grids.grid(x, has_alpha=not images.array_dtype))
    print(f"{len(chosen)} of the images{grids.drawn_as(len(shape) - 1)}: {out}")


def _check(out, path):
    """Raises UserError for an output that cannot be used."""
    if not out.endswith(".png"):
        raise UserError(f"--out={out} must end in .png")
    if path.is_dir():
        raise UserError(f"--out={out} is a folder: give a file in it")
    files.check_writable(path, f"--out={out}")


def _storage(images):
    """Returns where the images are, and how many were left out."""
    if isinstance(images, OnTheFly):
        return "no cache; unreadable images are not counted, because images are decoded on the fly"
    return f"cache: {images.folder}; unreadable images skipped: {images.num_skipped:,}"


def _looked_at(images: Cached | OnTheFly) -> np.ndarray:
    """Returns the indices of all images of a cache, or of a fixed random subset of images decoded on the fly."""
    if isinstance(images, Cached) or len(images) <= SUBSET:
        return np.arange(len(images))
    return np.sort(np.random.default_rng(0).choice(len(images), SUBSET, replace=False))


def _batches(images: Cached | OnTheFly, indices: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Reads images in blocks of about BLOCK bytes; shows a bar if this takes more than 2 seconds."""
    size = max(1, BLOCK // math.prod(images.shape[1:]))
    with tqdm.tqdm(total=len(indices), unit="image", desc="looking", delay=2) as bar:
        for block in np.split(indices, range(size, len(indices), size)):
            batch = images.examples(block)
            yield batch | {"image": pixels.to_uint8(batch["image"])}
            bar.update(len(block))


def _text(found: summary.Summary, counts: dict[str, int], count: int) -> str:
    """Returns lines with the values and the classes, and over how many of the `count` images they are."""
    over = f"all {count:,} images" if found.num == count else f"{found.num:,} of the images, drawn at random"
    channels = zip(found.lowest, found.highest, found.means, strict=True)
    values = ", ".join(f"{low}..{high} (mean {mean:.1f})" for low, high, mean in channels)
    return f"over {over}:\n  values of each channel: {values}\n  {_classes(counts)}"


def _classes(counts):
    if not counts:
        return "classes: none"
    if len(counts) <= LISTED:
        return f"{len(counts)} classes: " + ", ".join(f"{name} ({count:,})" for name, count in counts.items())
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return f"{len(counts):,} classes, from {least} ({counts[least]:,}) to {most} ({counts[most]:,})"
