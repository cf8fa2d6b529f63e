"""Images in LeCun's idx format, in which MNIST and Fashion-MNIST are published."""

import gzip
import hashlib
import re
from pathlib import Path

import numpy as np

from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError


def idx(file: Path) -> Source:
    """Returns the images of an idx file, which may be gzipped.

    The labels of …images-idx3… come from the file …labels-idx1… beside it, if there is one.

    Raises:
      UserError: a file is damaged, or the labels do not match the images.
    """
    images, labels = _read_idx(file, 3), None
    labels_file = file.with_name(file.name.replace("images-idx3", "labels-idx1"))
    if labels_file != file and labels_file.is_file():
        labels = _read_idx(labels_file, 1)
        if labels.shape != images.shape[:1]:
            raise UserError(
                f"config.data.path: {labels_file} has {len(labels)} labels for {len(images)} images: download both"
            )
    return Source(
        str(file),
        hashlib.sha256(images).hexdigest(),
        len(images),
        lambda i: f"{file.name}[{i}]",
        lambda i: images[i, ..., None],
        None if labels is None else labels.__getitem__,
    )


def _read_idx(file, dimensions):
    """Returns the array of an idx file.

    The format: 0 0 8 (uint8), the number of dimensions, their sizes as big-endian int32, then the bytes.
    """
    raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"not an idx file of uint8 {'images' if dimensions == 3 else 'labels'}")
        shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"config.data.path: {file} cannot be read ({error}): download it again") from None


def idx_file(path: Path, split: str) -> Path | None:
    """Returns `path` if it is an idx file, or the idx file of the split in a folder, or None."""
    stem = {"train": "train", "test": "t10k"}.get(split, split)
    candidates = [path] if path.is_file() else [path / f"{stem}-images-idx3-ubyte{end}" for end in (".gz", "")]
    return next((file for file in candidates if re.search(r"idx\d-ubyte", file.name) and file.is_file()), None)
