"""Opens the source that a config names, or a part of it."""

import dataclasses
import os
import re
from pathlib import Path

from diffusion_jax.data.arrays import arrays
from diffusion_jax.data.digits import digits
from diffusion_jax.data.folders import files
from diffusion_jax.data.hub import snapshot
from diffusion_jax.data.source import Source
from diffusion_jax.data.tfds import tfds
from diffusion_jax.errors import UserError


def open_source(
    source: str,
    path: str,
    *,
    split: str = "train",
    manual_dir: str = "",
    bounds: tuple[float, float] | None = None,
    channels: int = 3,
    size: tuple[int, ...] | None = None,
) -> Source:
    """Returns the source that config.data names.

    Args:
      source: "digits", "tfds:<name>", "hf:<owner>/<name>" (see `snapshot`), "files" for the files at `path`, or a path.
      path: the user's files, which take precedence over `source`; see `files`. With "tfds:<name>", an
        empty folder or a folder that contains a folder <name> is TFDS's data_dir instead.
      split: a split of TFDS, or "train", "test", … for `files`. Brackets select a part as in TFDS:
        "train[:1500]", "train[90%:]".
      manual_dir: see `tfds`.
      bounds, size: see `arrays`.
      channels: 1 or 3 for grey or RGB pictures, 4 for RGBA pictures, or the number of an array.

    Raises:
      UserError: the source does not exist, has no images, or cannot have so many channels.
    """
    if bounds and not _is_array(path or source):
        raise UserError(f"config.data.range={bounds} goes with arrays, .npy or .npz: leave it out")
    if size and not _is_array(path or source):
        raise UserError(
            f"config.data.image_size={size} makes signals or volumes, which come from arrays alone, .npy or .npz: give "
            "one, config.data.path, or (height, width)"
        )
    alpha = channels == 4
    if channels not in (1, 3, 4) and not _is_array(path or source):
        raise UserError(
            f"config.data.channels={channels} goes with arrays, .npy or .npz: give 1 (grey), 3 (RGB) or 4 (RGBA)"
        )
    if source.startswith("tfds:") and name_of(source, path) == source:
        return tfds(source.removeprefix("tfds:"), data_dir=path, manual_dir=manual_dir, split=split, alpha=alpha)
    split, part = _parse_split(split)
    if source == "digits" and not path:
        return _part(digits(split), part)
    if source.startswith("hf:") and not path:
        images = files(snapshot(source), split, only_parquet=True, alpha=alpha)
        return _part(dataclasses.replace(images, origin=source), part)  # the name of the folder is that of a commit
    if source == "files" and not path:
        raise UserError(
            "config.data.path is empty: give a folder, a zip, an idx, Parquet or .npy file, --config.data.path=…, or "
            "another config, e.g. --config=own --config.data.path=… or --config=digits"
        )
    file = Path(os.path.realpath(os.path.expanduser(path or source)))  # one name of a folder, one cache
    if os.path.exists(file) and _is_array(file.name):
        if split != "train":
            raise UserError(f"config.data.split={split!r}: an array has only 'train': give 'train', or a part of it")
        return _part(arrays(file, bounds, channels, size), part)
    if os.path.exists(file):  # False also where Path.exists raises an error
        return _part(files(file, split, alpha=alpha), part)
    if path:
        raise UserError(f"config.data.path={path!r} does not exist: give a folder, a zip, an idx, Parquet or .npy file")
    raise UserError(
        f"config.data.source={source!r} must be 'digits', 'tfds:<name>', 'hf:<owner>/<name>', 'files' or an existing "
        "path"
    )


def _is_array(path):
    return path.lower().endswith((".npy", ".npz"))


def name_of(source: str, path: str) -> str:
    """Returns what `open_source` reads: `source`, or `path` where it takes precedence."""
    name = source.removeprefix("tfds:")
    in_folder = source.startswith("tfds:") and _is_tfds_folder(Path(os.path.expanduser(path)), name)
    return source if not path or in_folder else path


def _parse_split(split):
    """Returns (name, (start, stop) or None) of a split such as "train" or "train[10%:500]"."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"config.data.split={split!r} must be a name, or a part of a split as in 'train[:90%]'")
    name, start, stop = match.groups()
    return name, (start, stop) if "[" in split else None


def _part(source, bounds):
    """Returns the images from start to stop of a source; bounds are numbers or percentages as in TFDS."""
    if bounds is None:
        return source

    def number(text, default):
        if text is None:
            return default
        return round(int(text[:-1]) * source.num / 100) if text.endswith("%") else int(text)

    start, stop = bounds
    numbers = range(source.num)[number(start, 0) : number(stop, source.num)]
    if not numbers:
        raise UserError(
            f"config.data.split: [{start or ''}:{stop or ''}] of {source.num} images is empty: give a larger part"
        )
    return dataclasses.replace(
        source,
        version=f"{source.version}[{numbers.start}:{numbers.stop}]",
        num=len(numbers),
        name=lambda i: source.name(numbers[i]),
        read=lambda i: source.read(numbers[i]),
        label=source.label and (lambda i: source.label(numbers[i])),
    )


def _is_tfds_folder(path, name):
    """Returns True for a folder that TFDS may use: an empty one, or one that contains the data set."""
    return path.is_dir() and ((path / name.split("/")[0].split(":")[0]).is_dir() or not any(path.iterdir()))
