"""Images in, batches out: `open_images` gives uint8 [N, H, W, C], `batches` what step k trains on.

Images are decoded once, into a memory-mapped .npy file; they stay uint8 up to the device.
"""

import concurrent.futures
import gzip
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grain  # noqa: TID251 (the input pipeline)
import numpy as np
import sklearn.datasets
import tqdm
from PIL import Image, ImageOps  # noqa: TID251 (decodes the images)

from diffusion_jax.errors import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 50_000_000  # of one image: a PNG of 200 kB can unpack to gigabytes


# ---------------------------------------------------------------- sources


class _Source(NamedTuple):
    names: Sequence[str]
    read: Callable[[int], Image.Image]
    fingerprint: str  # other files under the same names have another


def open_images(
    source: str,
    path: str,
    *,
    image_size: int,
    channels: int,
    crop: int = 0,
    skip_corrupt: bool = False,
    cache_dir: str = "",
) -> np.ndarray:
    """The data set as uint8 [N, image_size, image_size, channels], in memory or memory-mapped.

    Args:
      source: "digits", the 1,797 handwritten digits of scikit-learn, or "files".
      path: a folder or a zip of images (searched recursively, in the order of their
        names), an idx file, gzip'ed or not, or a folder with MNIST's file of training
        images. Goes before `source`.
      image_size, channels: what the images are resized (antialiased) and converted to.
      crop: side of the centre square that is kept, in pixels of the file; 0: the largest.
      skip_corrupt: leave out images that cannot be read, and say how many.
      cache_dir: where decoded images are kept; "" is ~/.cache/diffusion_jax.

    Raises:
      UserError: no such file, no image in it, or an image that cannot be used.
    """
    if not path and source == "digits":
        digits = sklearn.datasets.load_digits().images  # 0..16
        pixels = np.rint(digits * 255 / 16).astype(np.uint8)
        return np.stack([_fit(Image.fromarray(x), image_size, channels, crop) for x in pixels])
    if not path:
        if source != "files":
            raise UserError(f"config.data.source={source!r} must be 'digits' or 'files'")
        raise UserError("config.data.path is empty: give the folder, zip or idx file, --config.data.path=…")
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise UserError(f"config.data.path={path!r} does not exist: give a folder, a zip or an idx file")
    found = _idx(_idx_file(file)) if _idx_file(file) else _folder(file) if file.is_dir() else _zip(file)
    if not found.names:
        raise UserError(f"config.data.path={path!r} holds no images ({', '.join(sorted(SUFFIXES))})")

    identity = json.dumps([found.names, found.fingerprint, image_size, channels, crop, skip_corrupt])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(cache_dir or "~/.cache/diffusion_jax").expanduser()
    cache = folder / f"{file.stem}-{image_size}x{image_size}x{channels}-{digest}.npy"
    if not cache.exists():
        _decode(found, cache, (image_size, channels, crop), skip_corrupt)
    return np.load(cache, mmap_mode="r")


def _idx_file(path: Path):
    """The idx file that `path` is, or that lies in the folder, or None."""
    candidates = [path] if path.is_file() else [path / f"train-images-idx3-ubyte{end}" for end in (".gz", "")]
    for file in candidates:
        if "idx" in file.name and file.is_file():
            return file
    return None


def _idx(file: Path) -> _Source:
    """LeCun's format: 0 0 8 (uint8) 3 (dimensions), the three sizes as big-endian int32, then the bytes."""
    raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != b"\x00\x00\x08\x03":
            raise ValueError("not an idx file of uint8 images")
        images = np.frombuffer(raw, np.uint8, offset=16).reshape(np.frombuffer(raw, ">i4", 3, offset=4))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"config.data.path: {file} cannot be read ({error}): fetch it again") from None
    names = [f"{file.name}[{i}]" for i in range(len(images))]
    return _Source(names, lambda i: Image.fromarray(images[i]), hashlib.sha256(raw).hexdigest())


def _folder(folder: Path) -> _Source:
    files = sorted(path for path in folder.rglob("*") if _is_image(path))
    stats = [file.stat() for file in files]
    names = [str(file.relative_to(folder)) for file in files]
    return _Source(names, lambda i: Image.open(files[i]), str([(stat.st_size, stat.st_mtime_ns) for stat in stats]))


def _zip(file: Path) -> _Source:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"config.data.path='{file}' is no folder, zip or idx file") from None
    members = sorted((m for m in archive.infolist() if _is_image(Path(m.filename))), key=lambda m: m.filename)
    names = [member.filename for member in members]
    return _Source(
        names, lambda i: Image.open(io.BytesIO(archive.read(members[i]))), str([member.CRC for member in members])
    )


def _is_image(path: Path):
    """By its suffix; "._x.jpg" is what macOS leaves beside x.jpg."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


# ---------------------------------------------------------------- decoding


def _decode(source: _Source, cache: Path, form, skip_corrupt):
    """Decodes all images into `cache`; the file has that name only when it is whole."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            _npy_header(file, 0, form)
            corrupt = []
            for name, decoded in _decoded(source, form):
                if isinstance(decoded, np.ndarray):
                    file.write(decoded)
                elif skip_corrupt:
                    corrupt.append(f"{name}: {decoded}")
                else:
                    raise UserError(f"image {name}: {decoded}: mend it, or set --config.data.skip_corrupt=True")
            count = len(source.names) - len(corrupt)
            file.seek(0)
            _npy_header(file, count, form)
        if corrupt:
            print(f"left out {len(corrupt)} of {len(source.names)} images that cannot be read, first {corrupt[0]}")
        if not count:
            raise UserError(f"no image could be read, first {corrupt[0]}")
        os.replace(partial, cache)
    finally:
        partial.unlink(missing_ok=True)


def _npy_header(file, count, form):
    """Of one length whatever the count: NumPy leaves room for the first axis to grow."""
    image_size, channels, _ = form
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, channels)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(source, form):
    """Yields (name, uint8 image or what was wrong with it) in order; Pillow decodes on all cores."""

    def decode(i):
        try:
            with source.read(i) as image:
                return _fit(image, *form)
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            return error

    num = len(source.names)
    with concurrent.futures.ThreadPoolExecutor() as pool, tqdm.tqdm(total=num, unit="image", desc="decoding") as bar:
        for start in range(0, num, 1024):
            indices = range(start, min(start + 1024, num))
            for i, decoded in zip(indices, pool.map(decode, indices), strict=True):
                yield source.names[i], decoded
                bar.update()


def _fit(image: Image.Image, image_size, channels, crop) -> np.ndarray:
    """Orientation, grey or RGB over white, centre crop, antialiased resize: uint8 [S, S, channels]."""
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = crop or min(image.size)
    if side > min(image.size):
        raise ValueError(f"{image.width}x{image.height} is smaller than the crop of {crop} (config.data.crop)")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: the `box` of resize would let pixels from outside it into the edges.
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image_size, image_size, channels)


# ---------------------------------------------------------------- batches


def batches(
    images: np.ndarray, *, seed: int, batch_size: int, flip: bool, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """ds[k] is this process's share of the batch of step k: uint8 [batch_size / process_count, H, W, C].

    A pure function of (seed, k). Example j of process p is number j · process_count + p
    of the global batch, which is the same for every process_count. Each epoch has its
    own order; batches run across its end.
    """
    examples = grain.MapDataset.range(len(images)).shuffle(seed=seed).repeat()
    examples = examples.random_map(lambda index, rng: (index, flip and rng.random() < 0.5), seed=seed + 1)
    share = examples.slice(slice(process_index, None, process_count)).batch(batch_size // process_count)

    # Images are fetched last and by the batch: far cheaper than one by one through Grain.
    def fetch(example):
        indices, flipped = example
        batch = images[indices]
        batch[flipped] = batch[flipped, :, ::-1]
        return batch

    return share.map(fetch)


def iterate(dataset: grain.MapDataset, start: int):
    """An iterator over dataset[start], dataset[start + 1], …, read ahead by threads."""
    ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(ahead))
