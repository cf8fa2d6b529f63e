"""Images in LeCun's idx format, in which MNIST and Fashion-MNIST are published."""

import gzip
import hashlib
import math
import re
import zlib
from pathlib import Path

import numpy as np

from diffusion_jax.data.source import Source, printable
from diffusion_jax.errors import UserError

MAX_BYTES = 2_000_000_000  # bytes of the largest gzipped file, unpacked: a file of 2 MB may unpack to that


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
        printable(str(file)),
        hashlib.sha256(images).hexdigest(),
        len(images),
        lambda i: printable(f"{file.name}[{i}]"),
        lambda i: images[i, ..., None],
        None if labels is None else labels.__getitem__,
        () if labels is None else [str(k) for k in range(int(labels.max()) + 1)],
    )


def _read_idx(file, dimensions):
    """Returns the array of an idx file. Reads no more than its header says.

    The format: 0 0 8 (uint8), the number of dimensions, their sizes as big-endian int32, then the bytes.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            unpacked = gzip.GzipFile(fileobj=raw) if packed else raw
            head = unpacked.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(f"not an idx file of uint8 {'images' if dimensions == 3 else 'labels'}")
            shape = np.frombuffer(head, ">i4", dimensions, offset=4).tolist()
            size, limit = math.prod(shape), MAX_BYTES if packed else file.stat().st_size
            if min(shape) < 1:
                raise ValueError(f"its header says {'x'.join(map(str, shape))}, which is empty")
            if size > limit:
                raise ValueError(f"its header says {size} bytes, more than the {limit} that can be")
            values = unpacked.read(size + 1)
        if len(values) != size:
            raise ValueError(
                f"its header says {size} bytes, but it has {'more' if len(values) > size else len(values)}"
            )
        return np.frombuffer(values, np.uint8).reshape(shape)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        mend = "download it again, or gunzip it"
        raise UserError(f"config.data.path: {file} cannot be read ({error}): {mend}") from None


def idx_file(path: Path, split: str) -> Path | None:
    """Returns `path` if it is an idx file, or the idx file of the split in a folder, or None."""
    stem = {"train": "train", "test": "t10k"}.get(split, split)
    candidates = [path] if path.is_file() else [path / f"{stem}-images-idx3-ubyte{end}" for end in (".gz", "")]
    return next((file for file in candidates if re.search(r"idx\d-ubyte", file.name) and file.is_file()), None)
