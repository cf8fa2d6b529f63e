"""Images of one size: decoded once into a cache on disk, or on the fly if the cache would be too large.

Images stay uint8 up to the device. A cache is a folder:

    images.npy       uint8 [N, H, W, C], or float32 of arrays
    labels.npy       int32 [N], where the source has classes
    manifest.json    the source, the settings and checksums; a cache that does not match its manifest is rebuilt
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
import weakref
import zlib
from pathlib import Path

import numpy as np
import PIL  # noqa: TID251 (its version goes into the manifest)
import tqdm
from etils import epath
from PIL import Image  # noqa: TID251 (resizes the images)

from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError, one_line

_LOCAL = "~/.cache/diffusion_jax"
_FORMAT = 3  # version of the caches; increase it when the same settings give another content
_LEFTOVER = re.compile(r"-[0-9a-f]{16}\.[0-9a-f]{8}\.(partial|stale)")  # the end of the name of a temporary folder
_CHUNK = 32  # images per task of a decoding thread; with single images the threads contend


# ---------------------------------------------------------------- images


class Cached:
    """Reads the images of a cache: images[i] is [H, W, C]; images[indices] and images[a:b] are [n, H, W, C].

    The file is not memory-mapped: mapped pages count as memory of the process, which would grow with the data.
    """

    num_threads = 1  # threads that read ahead; reads are so short that two threads contend

    def __init__(self, folder: Path, array_dtype: str = ""):
        self.folder, self.array_dtype = folder, array_dtype
        with (folder / "images.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        self._file = os.open(folder / "images.npy", os.O_RDONLY)  # stays readable if another process rebuilds the cache
        weakref.finalize(self, os.close, self._file)
        manifest = json.loads((folder / "manifest.json").read_text())
        self.classes = tuple(manifest["classes"])
        self.num_skipped = len(manifest["skipped"])  # images of the source that could not be read
        labels = folder / "labels.npy"
        self.labels = np.load(labels) if labels.exists() else None

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {"image": [n, H, W, C]}, and "label" int32 [n] where the source has classes."""
        labels = {} if self.labels is None else {"label": self.labels[indices]}
        return {"image": self[indices]} | labels

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        images = np.empty((*numbers.shape, *self.shape[1:]), self.dtype)
        count = int(np.prod(self.shape[1:]))
        size = count * self.dtype.itemsize
        for row, i in zip(images.reshape(-1, count), numbers.flat, strict=True):
            if os.preadv(self._file, [row.data], self._start + int(i) * size) != size:
                raise UserError(f"{self.folder}/images.npy has become shorter: run again to rebuild the cache")
        return images


class OnTheFly:
    """Decodes the images of a source at each access; indexed as `Cached`, with the same pixels.

    An image that cannot be read raises UserError or, with skip_corrupt, is replaced by the next readable one.
    """

    num_threads = os.cpu_count() or 4

    def __init__(self, source: Source, image_size: tuple[int, ...], channels: int, crop: int, skip_corrupt: bool):
        self.shape = (len(source), *image_size, channels)
        self.dtype, self.array_dtype = np.dtype(source.dtype), source.array_dtype
        self.classes = tuple(source.classes)
        self._source = source
        self._form = (image_size, channels, crop)
        self._skip_corrupt = skip_corrupt

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {"image": [n, H, W, C]}, and "label" int32 [n] where the source has classes."""
        images, labels = zip(*(self._example(int(i)) for i in indices), strict=True)
        if self._source.label is None:
            return {"image": np.stack(images)}
        return {"image": np.stack(images), "label": np.array(labels, np.int32)}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        images = [self._example(int(i))[0] for i in numbers.flat]
        return np.stack(images).reshape(*numbers.shape, *self.shape[1:])

    def _example(self, i):
        """Returns the pixels and the label of image i, or of the next readable image."""
        for k in range(len(self)):
            number = (i + k) % len(self)
            image = _decode(self._source, number, self._form)
            if isinstance(image, np.ndarray):  # the label comes right after its image: `tfds` still has the example
                return image, self._source.label(number) if self._source.label else None
            if not self._skip_corrupt:
                raise _unreadable(self._source.name(i), image)
        raise UserError(
            f"no image of {self._source.origin} can be read (last error: {_message(image)}): repair the files"
        )


def open_images(
    source: Source,
    *,
    image_size: int | tuple[int, ...],
    channels: int,
    crop: int = 0,
    skip_corrupt: bool = False,
    cache_dir: str = "",
    cache_limit: float = float("inf"),
) -> Cached | OnTheFly:
    """Opens the images of a source in one size; the first call makes their cache.

    Args:
      source: the images.
      image_size: the height and width of the result, or (height, width), by a bicubic, antialiased resize. (length,)
        or (depth, height, width) are those of the source's signals or volumes, which stay as they are.
      channels: 1 (grey), 3 (RGB), 4 (RGBA), or as many as an array has.
      crop: height of the centre crop, in pixels of the source; 0 means the largest. Its shape is that of image_size.
      skip_corrupt: True skips images that cannot be read, and prints their number.
      cache_dir: the folder of the caches; "" is ~/.cache/diffusion_jax. A bucket, "gs://…", stores
        copies, so that only one machine has to decode.
      cache_limit: largest size of a cache in bytes; images that need more are decoded on the fly.

    Raises:
      UserError: an image cannot be read, or the disk has no room for the cache.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    form = (size, channels, crop)
    num_bytes = len(source) * math.prod(size) * channels * np.dtype(source.dtype).itemsize
    if num_bytes > cache_limit:
        print(
            f"{source.origin} is decoded on the fly: the cache would take {num_bytes / 1e9:.1f} GB "
            f"(config.data.cache_limit_gb={cache_limit / 1e9:g})"
        )
        return OnTheFly(source, *form, skip_corrupt)
    identity = {
        "format": _FORMAT,
        "version": source.version,
        "image_size": size[0] if size == (size[0],) * 2 else list(size),
        "channels": channels,
        "crop": crop,
        "skip_corrupt": skip_corrupt,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    stem = re.sub(r"\W+", "-", source.origin)[-40:].strip("-")
    name = f"{stem}-{'x'.join(map(str, size))}x{channels}-{digest}"
    remote = epath.Path(cache_dir) / name if "://" in cache_dir else None
    folder = Path(os.path.expanduser(_LOCAL if remote or not cache_dir else cache_dir)) / name
    if remote and not folder.exists() and (remote / "manifest.json").exists():
        with _replacing(folder) as partial:
            _copy(remote, partial)
    valid = _is_valid(folder, identity)
    if not valid:
        _make_cache(source, folder, identity, form, skip_corrupt, num_bytes)
    if remote and not (valid and (remote / "manifest.json").exists()):
        _copy(folder, remote)
    return Cached(folder, source.array_dtype)


# ---------------------------------------------------------------- the cache


def _is_valid(folder, identity):
    """Returns True if the cache exists and matches its manifest; prints why if it does not match."""
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")  # checks the length of the file
        size = manifest["image_size"]
        shape = (manifest["count"], *(size if isinstance(size, list) else [size, size]), manifest["channels"])
        labels = np.load(folder / "labels.npy", mmap_mode="r") if manifest["labelled"] else images
        matches = identity.items() <= manifest.items() and images.shape == shape and len(labels) == len(images)
        reason = _altered(folder, manifest) if matches else "it does not match its manifest"
        if not reason:
            return True
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    print(f"{folder} is damaged ({reason}): rebuilding it")
    return False


def _altered(folder, manifest):
    """Returns "" if the arrays are those of the manifest, else what differs.

    Computes the checksum of a file only if its time is not that of the manifest or another user owns it: somebody
    has copied or altered it, or may have. The time of a good copy is then set, so that the next call is short.
    """
    for name, (crc32, time_ns) in manifest["arrays"].items():
        file = folder / name
        status = file.stat()
        if (status.st_mtime_ns, status.st_uid) != (time_ns, os.getuid()):
            if _crc32(file) != crc32:
                return f"the checksum of {name} differs"
            with contextlib.suppress(OSError):  # of another user
                os.utime(file, ns=(status.st_atime_ns, time_ns))
    return ""


def _crc32(file):
    """Returns the CRC-32 of a file; 2 GB take about a second if they are in memory."""
    checksum, block = 0, bytearray(1 << 20)
    with file.open("rb", buffering=0) as raw:
        while size := raw.readinto(block):
            checksum = zlib.crc32(memoryview(block)[:size], checksum)
    return checksum


def _make_cache(source, folder, identity, form, skip_corrupt, num_bytes):
    """Decodes all images into a cache. Prints how many have more frames or pages than the first."""
    start = time.monotonic()
    with _replacing(folder) as partial:
        _check_room(folder.parent, num_bytes)
        labels, corrupt = _write_images(source, partial / "images.npy", form, skip_corrupt)
        if source.label:
            np.save(partial / "labels.npy", np.array(labels, np.int32))
        manifest = identity | {
            "source": source.origin,
            "count": len(labels),
            "names_sha256": _names_sha256(source),
            "labelled": source.label is not None,
            "classes": list(source.classes),
            "skipped": corrupt,
            "first_of_several": source.several(),
            "arrays": {file.name: (_crc32(file), file.stat().st_mtime_ns) for file in sorted(partial.iterdir())},
            "pillow": PIL.__version__,
            "seconds": round(time.monotonic() - start, 1),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if source.several():
        print(f"{source.several()} of {len(source)} images have several frames or pages: the first is taken")


def _copy(source, target):
    """Copies a cache from or to a bucket. The manifest comes last: a cache without it is incomplete."""
    source, target = epath.Path(source), epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("images.npy", "labels.npy", "manifest.json"):
        if (source / name).exists():
            (source / name).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _replacing(folder):
    """Yields a temporary folder that becomes `folder`, whole and on disk, when the block ends without an error.

    Its name is random: processes in containers may share a host name and a process number.
    """
    _remove_leftovers(folder.parent)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _put_in_place(partial, folder)
    except OSError as error:
        raise UserError(f"config.data.cache_dir: {folder} cannot be written ({error}): give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path):
    """Waits until a file or the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(parent):
    """Removes temporary folders in which nothing was written for an hour: killed processes left them."""
    with contextlib.suppress(OSError):  # another process removes or renames them too
        for folder in parent.iterdir():
            if _LEFTOVER.search(folder.name):
                newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
                if time.time() - newest > 3600:
                    shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(partial, folder):
    """Renames `partial` to `folder`, unless another process has done so with the same cache."""
    if folder.exists():  # damaged, see `_is_valid`
        stale = partial.with_suffix(".stale")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    with contextlib.suppress(OSError):  # some file systems of networks cannot sync folders
        _sync(folder)
        _sync(folder.parent)


def _check_room(folder, num_bytes):
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"config.data.cache_dir: {folder} has {free / 1e9:.1f} GB free, but the cache takes {num_bytes / 1e9:.1f} "
            "GB: free some space, give another folder, or lower config.data.cache_limit_gb to decode on the fly"
        )


def _names_sha256(source):
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.name(i).encode() + b"\n")
    return digest.hexdigest()


def _write_images(source, path, form, skip_corrupt):
    """Streams the images to a .npy file. Returns (labels, names and errors of the skipped images)."""
    labels, corrupt = [], []
    with path.open("wb") as file:
        _npy_header(file, 0, form, source.dtype)
        for i, image, label in _decoded(source, form):
            if isinstance(image, np.ndarray):
                file.write(image)
                labels.append(label)
            elif skip_corrupt:
                corrupt.append(f"{source.name(i)}: {_message(image)}")
            else:
                raise _unreadable(source.name(i), image)
        file.seek(0)
        _npy_header(file, len(labels), form, source.dtype)
    if corrupt:
        print(f"skipped {len(corrupt)} of {len(source)} images that cannot be read; the first is {corrupt[0]}")
    if not labels:
        raise UserError(f"no image of {source.origin} can be read (first error: {corrupt[0]}): repair the files")
    return labels, corrupt


def _npy_header(file, count, form, dtype):
    """Writes a header of the same length for any count: NumPy leaves room for the first axis to grow."""
    image_size, channels, _ = form
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *image_size, channels)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(source, form):
    """Yields (i, image or the error of its decoder, label) in order; threads decode chunks ahead."""

    def decode(chunk):
        return [(i, _decode(source, i, form), source.label(i) if source.label else 0) for i in chunk]

    chunks = (range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK))
    threads = os.cpu_count() or 1
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(total=len(source), unit="image", desc="decoding") as bar,
    ):
        ahead = collections.deque(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, 2 * threads))
        while ahead:
            decoded = ahead.popleft().result()
            ahead.extend(pool.submit(decode, chunk) for chunk in itertools.islice(chunks, 1))
            yield from decoded
            bar.update(len(decoded))


def _decode(source, i, form):
    """Returns image i, or the exception of its decoder, which may be of any type."""
    try:
        return _fit(source[i], *form, is_picture=not source.array_dtype)
    except Exception as error:
        return error


def _fit(image, image_size, channels, crop, is_picture):
    """Crops the centre of [H, W, C], converts it to grey, RGB or RGBA, and resizes it to [*image_size, channels].

    Signals and volumes stay as they are.
    """
    if len(image_size) != 2:
        return np.ascontiguousarray(image)
    height, width, own = image.shape
    crop_height, crop_width = _crop_size(height, width, image_size, crop)
    if crop_height > height or crop_width > width:
        raise ValueError(
            f"{width}x{height} is smaller than the crop of {crop_width}x{crop_height} (config.data.crop={crop})"
        )
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    # Crops first: with the `box` of resize, pixels outside of it would bleed into the edges.
    centre = image[top : top + crop_height, left : left + crop_width]
    if image.dtype != np.uint8 or (own not in (1, 3) and not is_picture):  # no channel of an array is alpha
        planes = [Image.fromarray(np.ascontiguousarray(centre[..., k])) for k in range(own)]
        return np.stack([plane.resize(image_size[::-1], Image.Resampling.BICUBIC) for plane in planes], axis=-1)
    picture = Image.fromarray(centre[..., 0] if own == 1 else centre)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    picture = picture if picture.mode == mode else picture.convert(mode)
    picture = picture.resize(image_size[::-1], Image.Resampling.BICUBIC)  # weights the colours of RGBA by alpha
    return np.asarray(picture).reshape(*image_size, channels)


def _crop_size(height, width, image_size, crop):
    """Returns (height, width) of the crop in the shape of `image_size`: of the height `crop`, or the largest for 0."""
    rows, columns = image_size
    if crop or height * columns <= width * rows:  # the image is wider than the crop
        return crop or height, max(1, round((crop or height) * columns / rows))
    return max(1, round(width * rows / columns)), width


def _unreadable(name, error):
    return UserError(f"image {name}: {_message(error)}: repair it, or set --config.data.skip_corrupt=True")


def _message(error):
    return one_line(error) or type(error).__name__
