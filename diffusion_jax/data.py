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
from pathlib import Path

import grain  # noqa: TID251 (the input pipeline)
import numpy as np
import sklearn.datasets
import tqdm
from PIL import Image, ImageOps  # noqa: TID251 (decodes the images)

from diffusion_jax.errors import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 50_000_000  # of one image: a PNG of 200 kB can unpack to gigabytes


# ---------------------------------------------------------------- sources
# A source is (names, read): what the images are called, and read(i) -> Pillow image.


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
        names, read = _digits()
        return np.stack([_fit(read(i), image_size, channels, crop) for i in range(len(names))])
    if not path:
        if source != "files":
            raise UserError(f"config.data.source={source!r} must be 'digits' or 'files'")
        raise UserError("config.data.path is empty: give the folder, zip or idx file, --config.data.path=…")
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise UserError(f"config.data.path={path!r} does not exist: give a folder, a zip or an idx file")
    names, read = _idx(file) if _idx_file(file) else _image_files(file)
    if not names:
        raise UserError(f"config.data.path={path!r} holds no images ({', '.join(sorted(SUFFIXES))})")

    identity = json.dumps([str(file), names, image_size, channels, crop, skip_corrupt])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(cache_dir or "~/.cache/diffusion_jax").expanduser()
    cache = folder / f"{file.stem}-{image_size}x{image_size}x{channels}-{digest}.npy"
    if not cache.exists():
        _decode(names, read, cache, (image_size, channels, crop), skip_corrupt)
    return np.load(cache, mmap_mode="r")


def _digits():
    """Values 0..16 in scikit-learn."""
    images = sklearn.datasets.load_digits().images
    return range(len(images)), lambda i: Image.fromarray(np.rint(images[i] * 255 / 16).astype(np.uint8))


def _idx_file(path: Path):
    """The idx file that `path` is, or that lies in the folder, or None."""
    candidates = [path] if path.is_file() else [path / f"train-images-idx3-ubyte{end}" for end in (".gz", "")]
    for file in candidates:
        if "idx" in file.name and file.is_file():
            return file
    return None


def _idx(path: Path):
    """LeCun's format: 0 0 8 (uint8) 3 (dimensions), the three sizes as big-endian int32, then the bytes."""
    file = _idx_file(path)
    raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != b"\x00\x00\x08\x03":
            raise ValueError("not an idx file of uint8 images")
        images = np.frombuffer(raw, np.uint8, offset=16).reshape(np.frombuffer(raw, ">i4", 3, offset=4))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"config.data.path: {file} cannot be read ({error}): fetch it again") from None
    signature = hashlib.sha256(raw).hexdigest()
    return [f"{signature}:{i}" for i in range(len(images))], lambda i: Image.fromarray(images[i])


def _image_files(path: Path):
    """Names end in what tells one version of a file from the next: CRC, or size and time."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        stats = [file.stat() for file in files]
        names = [f"{f.relative_to(path)} [{s.st_size} {s.st_mtime_ns}]" for f, s in zip(files, stats, strict=True)]
        return names, lambda i: Image.open(files[i])
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(f"config.data.path='{path}' is no folder, zip or idx file") from None
    members = sorted((m for m in archive.infolist() if _is_image(m.filename)), key=lambda m: m.filename)
    return [f"{m.filename} [{m.CRC}]" for m in members], lambda i: Image.open(io.BytesIO(archive.read(members[i])))


def _is_image(name):
    return Path(name).suffix.lower() in SUFFIXES and "__MACOSX" not in name


# ---------------------------------------------------------------- decoding


def _decode(names, read, cache: Path, form, skip_corrupt):
    """Decodes all images into `cache`; the file has that name only when it is whole."""
    image_size, channels, _ = form
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}.partial")

    def image(i):
        try:
            return _fit(read(i), *form)
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            return error

    try:
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(names), image_size, image_size, channels))
        count, corrupt = 0, []
        with concurrent.futures.ThreadPoolExecutor() as pool, tqdm.tqdm(total=len(names), unit="image") as bar:
            bar.set_description("decoding")
            for start in range(0, len(names), 1024):
                indices = range(start, min(start + 1024, len(names)))
                for i, decoded in zip(indices, pool.map(image, indices), strict=True):
                    if isinstance(decoded, Exception):
                        corrupt.append(f"{names[i]}: {decoded}")
                        if not skip_corrupt:
                            raise UserError(f"image {corrupt[0]}: mend it, or set --config.data.skip_corrupt=True")
                    else:
                        out[count] = decoded
                        count += 1
                bar.update(len(indices))
        if corrupt:
            print(f"left out {len(corrupt)} of {len(names)} images that cannot be read, first {corrupt[0]}")
        if not count:
            raise UserError(f"no image could be read, first {corrupt[0]}")
        out.flush()
        if corrupt:
            with open(partial, "wb") as file:
                np.save(file, np.array(out[:count]))
        os.replace(partial, cache)
    finally:
        partial.unlink(missing_ok=True)


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
    box = (left, top, left + side, top + side)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
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
