"""Images of one size, decoded once into a cache on disk, or on the fly where the cache would be too large.

Images stay uint8 up to the device. A cache is a folder:

    images.npy       uint8 [N, S, S, C]
    labels.npy       int32 [N], where the source has classes
    manifest.json    the source and the settings; without it, or at odds with it, the cache is made again
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
import PIL  # noqa: TID251 (its version goes into the manifest)
import tqdm
from etils import epath
from PIL import Image  # noqa: TID251 (resizes the images)

from diffusion_jax.data.sources import Source
from diffusion_jax.errors import UserError

_LOCAL = "~/.cache/diffusion_jax"
_FORMAT = 1  # of the caches: raise it when the same settings give other pixels
_CHUNK = 32  # images that a thread decodes at a time: one by one, threads wait for each other


# ---------------------------------------------------------------- images


class Cached:
    """The images of a cache: images[i] is uint8 [S, S, C]; images[indices] and images[a:b] are [n, S, S, C].

    The file is read, not mapped: mapped pages count as memory of the process, which would grow with the data.
    """

    num_threads = 1  # threads that read ahead; reading is so quick that two threads wait for each other

    def __init__(self, folder: Path):
        self.folder = folder
        with (folder / "images.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, _ = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        labels = folder / "labels.npy"
        self.labels = np.load(labels) if labels.exists() else None

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {"image": uint8 [n, S, S, C]}, and "label" int32 [n] where the source has classes."""
        labels = {} if self.labels is None else {"label": self.labels[indices]}
        return {"image": self[indices]} | labels

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        numbers = np.arange(len(self))[index]
        images = np.empty((*numbers.shape, *self.shape[1:]), np.uint8)
        size = int(np.prod(self.shape[1:]))
        with (self.folder / "images.npy").open("rb") as file:
            for row, i in zip(images.reshape(-1, size), numbers.flat, strict=True):
                if os.preadv(file.fileno(), [row], self._start + int(i) * size) != size:
                    raise UserError(f"{self.folder} has become shorter: run again, and it is made again")
        return images


class OnTheFly:
    """Images of a source, decoded whenever they are asked for; indexed as `Cached`, with the same pixels.

    An image that cannot be read stops the run or, with skip_corrupt, gives way to the next one that can.
    """

    num_threads = os.cpu_count() or 4

    def __init__(self, source: Source, image_size: int, channels: int, crop: int, skip_corrupt: bool):
        self.shape = (len(source), image_size, image_size, channels)
        self._source = source
        self._form = (image_size, channels, crop)
        self._skip_corrupt = skip_corrupt

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {"image": uint8 [n, S, S, C]}, and "label" int32 [n] where the source has classes."""
        images, labels = zip(*(self._example(int(i)) for i in indices), strict=True)
        if self._source.label is None:
            return {"image": np.stack(images)}
        return {"image": np.stack(images), "label": np.array(labels, np.int32)}

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        numbers = np.arange(len(self))[index]
        images = [self._example(int(i))[0] for i in numbers.flat]
        return np.stack(images).reshape(*numbers.shape, *self.shape[1:])

    def _example(self, i):
        """Returns the pixels and the label of image i, or of the next one that can be read."""
        for k in range(len(self)):
            number = (i + k) % len(self)
            image = _decode(self._source, number, self._form)
            if isinstance(image, np.ndarray):  # TFDS keeps the last examples: a label right after its image is free
                return image, self._source.label(number) if self._source.label else None
            if not self._skip_corrupt:
                raise _unreadable(self._source.name(i), image)
        raise UserError(f"no image of {self._source.origin} can be read, the last: {image}")


def open_images(
    source: Source,
    *,
    image_size: int,
    channels: int,
    crop: int = 0,
    skip_corrupt: bool = False,
    cache_dir: str = "",
    cache_limit: float = float("inf"),
) -> Cached | OnTheFly:
    """The images of a source in one size, from the cache, which is made if there is none yet.

    Args:
      image_size, channels: what the images are resized (bicubic, antialiased) and converted to.
      crop: side of the centre square that is kept, in pixels of the source; 0: the largest.
      skip_corrupt: leave out images that cannot be read, and say how many.
      cache_dir: where the caches are; "" is ~/.cache/diffusion_jax. Of a bucket, "gs://…", the
        cache is copied to there and from there, so that one machine alone need decode.
      cache_limit: in bytes; a cache that would be larger is not made, images are decoded on the fly.

    Raises:
      UserError: an image that cannot be used, or no room for the cache.
    """
    form = (image_size, channels, crop)
    num_bytes = len(source) * image_size * image_size * channels
    if num_bytes > cache_limit:
        print(
            f"{source.origin}: decoded on the fly, the cache would take {num_bytes / 1e9:.1f} GB "
            f"(config.data.cache_limit_gb={cache_limit / 1e9:g})"
        )
        return OnTheFly(source, *form, skip_corrupt)
    identity = {
        "format": _FORMAT,
        "version": source.version,
        "image_size": image_size,
        "channels": channels,
        "crop": crop,
        "skip_corrupt": skip_corrupt,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    stem = re.sub(r"\W+", "-", source.origin)[-40:].strip("-")
    name = f"{stem}-{image_size}x{image_size}x{channels}-{digest}"
    remote = epath.Path(cache_dir) / name if "://" in cache_dir else None
    folder = Path(_LOCAL if remote or not cache_dir else cache_dir).expanduser() / name
    if remote and not folder.exists() and (remote / "manifest.json").exists():
        _copy(remote, folder)
    if not _is_whole(folder, identity):
        _make_cache(source, folder, identity, form, skip_corrupt)
    if remote and not (remote / "manifest.json").exists():
        _copy(folder, remote)
    return Cached(folder)


# ---------------------------------------------------------------- the cache


def _is_whole(folder, identity):
    """Whether the cache is there, as its manifest says. Says so if it is there and is not."""
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")  # checks the length of the file
        shape = (manifest["count"], manifest["image_size"], manifest["image_size"], manifest["channels"])
        labels = np.load(folder / "labels.npy", mmap_mode="r") if manifest["labelled"] else images
        if identity.items() <= manifest.items() and images.shape == shape and len(labels) == len(images):
            return True
        reason = "its manifest says otherwise"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    print(f"{folder} is not whole ({reason}): decoding again")
    return False


def _make_cache(source, folder, identity, form, skip_corrupt):
    """Decodes all images beside `folder`, which gets its name only when it is whole."""
    _remove_leftovers(folder)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    start = time.monotonic()
    try:
        partial.mkdir(parents=True)
        _check_room(folder.parent, len(source) * form[0] * form[0] * form[1])
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
            "pillow": PIL.__version__,
            "seconds": round(time.monotonic() - start, 1),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _put_in_place(partial, folder)
    except OSError as error:
        raise UserError(f"config.data.cache_dir: {folder} cannot be written ({error}): give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source, target):
    """Copies a cache from or to a bucket; what makes it whole, the manifest, comes last."""
    source, target = epath.Path(source), epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("images.npy", "labels.npy", "manifest.json"):
        if (source / name).exists():
            (source / name).copy(target / name, overwrite=True)


def _remove_leftovers(folder):
    """What killed processes left of this cache: not written to for an hour."""
    for partial in folder.parent.glob(f"{folder.name}.*.partial"):
        newest = max((file.stat().st_mtime for file in partial.iterdir()), default=0)
        if time.time() - newest > 3600:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial, folder):
    if folder.exists():  # not whole
        folder.rename(partial.with_suffix(".stale"))
        shutil.rmtree(partial.with_suffix(".stale"))
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # else another process has made the same cache meanwhile
            raise


def _check_room(folder, num_bytes):
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"config.data.cache_dir: {folder} has {free / 1e9:.1f} GB free, and the cache takes {num_bytes / 1e9:.1f} "
            "GB: make room, give another folder, or lower config.data.cache_limit_gb to decode on the fly"
        )


def _names_sha256(source):
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.name(i).encode() + b"\n")
    return digest.hexdigest()


def _write_images(source, path, form, skip_corrupt):
    """Streams the images to a .npy file. Returns (labels, names and errors of what was left out)."""
    labels, corrupt = [], []
    with path.open("wb") as file:
        _npy_header(file, 0, form)
        for i, image, label in _decoded(source, form):
            if isinstance(image, np.ndarray):
                file.write(image)
                labels.append(label)
            elif skip_corrupt:
                corrupt.append(f"{source.name(i)}: {image}")
            else:
                raise _unreadable(source.name(i), image)
        file.seek(0)
        _npy_header(file, len(labels), form)
    if corrupt:
        print(f"left out {len(corrupt)} of {len(source)} images that cannot be read, first {corrupt[0]}")
    if not labels:
        raise UserError(f"no image of {source.origin} can be read, first {corrupt[0]}")
    return labels, corrupt


def _npy_header(file, count, form):
    """Of one length whatever the count: NumPy leaves room for the first axis to grow."""
    image_size, channels, _ = form
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, channels)}
    np.lib.format.write_array_header_1_0(file, header)


def _decoded(source, form):
    """Yields (i, uint8 image or what was wrong with it, its label) in order; threads decode chunks ahead."""

    def decode(chunk):
        return [(i, _decode(source, i, form), source.label(i) if source.label else 0) for i in chunk]

    chunks = (range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK))
    threads = os.cpu_count() or 1
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(total=len(source), unit="image", desc="decoding") as bar,
    ):
        ahead = collections.deque()
        for chunk in chunks:
            ahead.append(pool.submit(decode, chunk))
            if len(ahead) > 2 * threads:
                yield from ahead.popleft().result()
                bar.update(_CHUNK)
        while ahead:
            decoded = ahead.popleft().result()
            yield from decoded
            bar.update(len(decoded))


def _decode(source, i, form):
    """Image i, or the error: damaged files make decoders raise nearly anything."""
    try:
        return _fit(source[i], *form)
    except Exception as error:
        return error


def _fit(image, image_size, channels, crop):
    """Centre crop, grey or RGB, antialiased resize: uint8 [H, W, 1 or 3] to [image_size, image_size, channels]."""
    height, width, _ = image.shape
    side = crop or min(height, width)
    if side > min(height, width):
        raise ValueError(f"{width}x{height} is smaller than the crop of {crop} (config.data.crop)")
    left, top = (width - side) // 2, (height - side) // 2
    # Cropped first: the `box` of resize would let pixels from outside it into the edges.
    square = image[top : top + side, left : left + side]
    picture = Image.fromarray(square[..., 0] if square.shape[-1] == 1 else square)
    mode = "L" if channels == 1 else "RGB"
    picture = picture if picture.mode == mode else picture.convert(mode)
    picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(image_size, image_size, channels)


def _unreadable(name, error):
    return UserError(f"image {name}: {error}: mend it, or set --config.data.skip_corrupt=True")
