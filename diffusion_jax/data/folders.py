"""The user's own images: folders, zips and idx files."""

import hashlib
import io
import math
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps  # noqa: TID251 (decodes the images)

from diffusion_jax.data.idx import idx, idx_file
from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 50_000_000  # pixels of the largest image: a PNG of 200 kB can unpack to gigabytes
MAX_BYTES = 500_000_000  # bytes of the largest file in a zip, unpacked


def files(file: Path, split: str = "train") -> Source:
    """Returns the images of a folder, a zip, an idx file, or a folder with MNIST's idx files.

    Folders and zips are searched recursively, and their images sorted by name. If some images are in a folder
    named `split`, only these are used. If the images have more than one parent folder, these are the classes.

    Raises:
      UserError: there is no image or no folder of that split, or a zip or an idx file is damaged.
    """
    if path := idx_file(file, split):
        return idx(path)
    source = folder(file, split) if file.is_dir() else archive(file, split)
    if not source.num:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"config.data.path='{file}' holds no images: give a folder or a zip with {suffixes} files")
    return source


def folder(root: Path, split: str = "train") -> Source:
    """Returns the images of a folder, see `files`."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if _is_image(path))
    names = _names_of_split(names, split, root)
    stats = [(root / name).stat() for name in names]

    def read(i):
        with Image.open(root / names[i]) as image:
            return pixels(image)

    label, classes = _labels(names)
    version = _sha256([names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]])
    return Source(str(root), version, len(names), names.__getitem__, read, label, classes)


def archive(file: Path, split: str = "train") -> Source:
    """Returns the images of a zip, see `files`."""
    try:
        unpacked = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"config.data.path='{file}' must be a folder, a zip or an idx file") from None
    members = {m.filename: m for m in unpacked.infolist() if _is_image(PurePosixPath(m.filename))}
    names = _names_of_split(sorted(members), split, file)

    def read(i):
        member = members[names[i]]
        if member.file_size > MAX_BYTES:
            raise ValueError(f"{member.file_size} bytes unpacked are more than the limit of {MAX_BYTES}")
        with Image.open(io.BytesIO(unpacked.read(member))) as image:
            return pixels(image)

    label, classes = _labels(names)
    version = _sha256([names, [members[name].CRC for name in names]])
    return Source(str(file), version, len(names), names.__getitem__, read, label, classes)


def _is_image(path):
    """Returns True if the suffix is that of an image. Skips hidden files: macOS leaves ._x.jpg beside x.jpg."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _names_of_split(names, split, path):
    """Returns the names in a folder called `split`, or all names if the split is "train" and has no folder."""
    chosen = [name for name in names if split in PurePosixPath(name).parts[:-1]]
    if not chosen and split != "train":
        raise UserError(
            f"config.data.split={split!r}: '{path}' has no images in a folder of that name: give a split that it has"
        )
    return chosen or names


def _labels(names):
    """Returns (label of image i, classes) from the parent folders, or (None, ()) for a single folder."""
    parents = [PurePosixPath(name).parent.name for name in names]
    classes = sorted(set(parents))
    if len(classes) < 2:
        return None, ()
    numbers = {name: k for k, name in enumerate(classes)}
    return lambda i: numbers[parents[i]], classes


def _sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


def pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels that a viewer shows, uint8 [H, W, 1] if the image is grey, else [H, W, 3].

    Applies the orientation of the EXIF data and the palette, lays transparent parts on white, and reduces
    16 bits to 8.

    Raises:
      ValueError: the image has more than MAX_PIXELS.
      Exception: Pillow cannot decode the image, and raises many types.
    """
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than the limit of {MAX_PIXELS} pixels")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if image.mode in ("1", "L", "I", "F") else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(image).reshape(image.height, image.width, -1)
