"""Arrays of images in NumPy's files."""

import hashlib
import math
import os
import weakref
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_jax.data.source import Source, printable
from diffusion_jax.errors import UserError, one_line

_SEEN = 1000  # images whose range an error message tells
_IMAGES, _LABELS = ("images", "arr_0"), "labels"  # names in an .npz
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}  # of signals, images and volumes
_Rows = tuple[tuple[int, ...], np.dtype, Callable[[int], np.ndarray]]  # shape, dtype, i -> row i


def arrays(
    file: Path,
    bounds: tuple[float, float] | None = None,
    channels: int | None = None,
    size: tuple[int, ...] | None = None,
) -> Source:
    """Returns the images of a .npy or .npz file, [N, H, W, C] or [N, H, W], of any number of channels.

    They may also be signals, [N, L, C] or [N, L], or volumes, [N, D, H, W, C] or [N, D, H, W].

    An .npz has them as "images" or "arr_0". It may have "labels" [N]: integers, which are the classes, or names. A
    .npy, and an .npz that is not compressed, are read image by image. A compressed .npz is read into memory.

    Args:
      bounds: (lo, hi), which become −1 and 1: the images are then float32. None takes uint8, whose levels stay.
      channels: the channels that the images must have; grey and RGB images in uint8 go with each other. None takes any.
      size: (L,) of signals or (D, H, W) of volumes, which must be that of the array. None takes images of any size.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        shape, dtype, row, labels = _open(file)
        status = file.stat()
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"config.data.path: {file} cannot be read ({one_line(error)}): write it again") from None
    _check(file, shape, dtype, row, bounds, channels, size)
    classes, numbers = (), None
    if labels is not None:
        classes, numbers = _classes(file, labels, shape[0])
    about = (file.name, status.st_size, status.st_mtime_ns, bounds)

    def read(i):
        image = row(i).reshape(*(size or shape[1:3]), -1)
        return image if bounds is None else _mapped(image, *bounds)

    return Source(
        printable(str(file)),
        hashlib.sha256(repr(about).encode()).hexdigest(),
        shape[0],
        lambda i: printable(f"{file.name}[{i}]"),
        read,
        None if numbers is None else (lambda i: int(numbers[i])),
        classes,
        dtype="uint8" if bounds is None else "float32",
        array_dtype=dtype.name if dtype.kind in "ui" else "float32",
    )


def _open(file):
    """Returns (shape, dtype, i -> row i, labels or None) of a file."""
    if file.suffix.lower() == ".npy":
        return *_rows(file, 0), None
    with zipfile.ZipFile(file) as members, np.load(file) as loaded:
        name = next((name for name in _IMAGES if name in loaded.files), None)
        if name is None:
            has = ", ".join(map(printable, loaded.files[:5])) or "nothing"
            raise ValueError(f"it has {has}, but neither {' nor '.join(_IMAGES)}")
        labels = loaded[_LABELS] if _LABELS in loaded.files else None
        member = members.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            return *_rows(file, _offset(file, member)), labels
        array = loaded[name]
        return array.shape, array.dtype, array.__getitem__, labels


def _offset(file, member):
    """Returns where the bytes of a stored member begin: after a header of 30 bytes, its name and an extra field."""
    with file.open("rb") as raw:
        raw.seek(member.header_offset + 26)
        return member.header_offset + 30 + sum(np.frombuffer(raw.read(4), "<u2").tolist())


def _rows(file, start) -> _Rows:
    """Returns the rows of the .npy that begins at the byte `start` of a file; each is read when it is asked for.

    The file is not memory-mapped: mapped pages count as memory of the process.
    """
    with file.open("rb") as raw:
        raw.seek(start)
        version = np.lib.format.read_magic(raw)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"version {version} of the .npy format is not known")
        shape, is_fortran, dtype = header(raw)
        first, size = raw.tell(), int(np.prod(shape[1:])) * dtype.itemsize
    if dtype.hasobject or is_fortran:
        raise ValueError("it holds Python objects" if dtype.hasobject else "it is in Fortran's order")
    if first + math.prod(shape[:1]) * size > file.stat().st_size:
        raise ValueError("it is shorter than its header says")
    descriptor = os.open(file, os.O_RDONLY)

    def row(i):
        return np.frombuffer(os.pread(descriptor, size, first + i * size), dtype).reshape(shape[1:])

    weakref.finalize(row, os.close, descriptor)
    return shape, dtype, row


def _check(file, shape, dtype, row, bounds, channels, size):
    """Raises UserError unless these are images, signals or volumes that `bounds`, `channels` and `size` fit."""
    axes = 2 if size is None else len(size)
    name = f"config.data.path: {file} holds {dtype} {list(shape)}"
    if len(shape) not in (1 + axes, 2 + axes) or 0 in shape or dtype.kind not in "uif":
        wanted = f"give numbers [N, {_AXES[axes]}, C] or [N, {_AXES[axes]}]"
        others = ", or (L,) as config.data.image_size for signals [N, L, C], (D, H, W) for volumes [N, D, H, W, C]"
        kind = {1: "signals", 2: "images", 3: "volumes"}[axes]
        raise UserError(f"{name}, not {kind}: {wanted}{others if axes == 2 else ''}")
    if axes == 2 and len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > 4:
        raise UserError(f"{name}, which looks like [N, C, H, W]: give array.transpose(0, 2, 3, 1)")
    if dtype != np.uint8 and bounds is None:
        raise UserError(
            f"{name}{_extent(row, shape[0])}: give the numbers that become -1 and 1, e.g. "
            "--config.data.range='(0, 4095)'"
        )
    own_size, own = shape[1 : 1 + axes], shape[-1] if len(shape) == 2 + axes else 1
    if size not in (None, own_size):
        raise UserError(
            f"config.data.path: {file} holds the size {own_size}, not config.data.image_size={size}: give that of the "
            "array, because signals and volumes are not resized"
        )
    if channels not in (None, own) and not ({own, channels} <= {1, 3} and bounds is None and axes == 2):
        volumes = ", or (D, H, W) as config.data.image_size for volumes" if axes == 2 and own > 4 else ""
        raise UserError(f"{name}, {own} channels, but config.data.channels={channels}: give {own}{volumes}")


def _extent(row, num):
    """Returns " from LOW to HIGH", the finite values of the first images, or "" if there are none."""
    seen = [image[np.isfinite(image)] for image in map(row, range(min(_SEEN, num)))]
    seen = [values for values in seen if values.size]
    return f" from {min(map(np.min, seen)):g} to {max(map(np.max, seen)):g}" if seen else ""


def _mapped(image, low, high):
    """Maps low..high to float32 in −1..1; raises ValueError for values outside."""
    image = image.astype(np.float64)
    if num := np.isnan(image).sum():
        raise ValueError(f"{num:,} of {image.size:,} values are NaN, which config.data.range cannot map")
    least, most, tolerance = image.min(), image.max(), 1e-6 * (high - low)
    if not (low - tolerance <= least and most <= high + tolerance):
        raise ValueError(
            f"values from {least:g} to {most:g} are outside config.data.range=({low:g}, {high:g}), which may be wider"
        )
    return np.clip(2 * (image - low) / (high - low) - 1, -1, 1).astype(np.float32)


def _classes(file, labels, num):
    """Returns (the names of the classes, the class of each image int [N])."""
    if labels.shape != (num,) or labels.dtype.kind not in "iuU" or (labels.dtype.kind == "i" and labels.min() < 0):
        raise UserError(
            f"config.data.path: {file} has labels {labels.dtype} {list(labels.shape)} for {num} images: give a "
            "number >= 0 or a name for each"
        )
    if labels.dtype.kind == "U":
        names, numbers = np.unique(labels, return_inverse=True)
        return [printable(str(name)) for name in names], numbers
    return [str(k) for k in range(int(labels.max()) + 1)], labels
