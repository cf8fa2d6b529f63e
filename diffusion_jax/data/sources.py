"""Sources of images: one function for each kind, which returns a `Source`.

A source gives each image as a viewer shows it: upright, grey or RGB, on white, of any size.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps  # noqa: TID251 (decodes the images)

from diffusion_jax.errors import UserError, one_line

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 50_000_000  # pixels of the largest image: a PNG of 200 kB can unpack to gigabytes
MAX_BYTES = 500_000_000  # bytes of the largest file in a zip, unpacked


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds images by number: source[i] is uint8 [H, W, 1 or 3] of any H and W, i < len(source).

    A damaged image raises the error of its decoder; an image beyond MAX_PIXELS or MAX_BYTES raises ValueError.
    """

    origin: str  # the file or the data set, for messages
    version: str  # identifies the names, files and release, for the cache
    num: int  # images
    name: Callable[[int], str]  # the name of image i, for messages
    read: Callable[[int], np.ndarray]  # the pixels of image i
    label: Callable[[int], int] | None = None  # the class of image i; None without classes
    classes: Sequence[str] = ()  # the names of the classes; () without names

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(i)


def open_source(source: str, path: str, *, split: str = "train", manual_dir: str = "") -> Source:
    """Returns the source that config.data names.

    Args:
      source: "digits", "tfds:<name>", "files" for the files at `path`, or a path.
      path: the user's files, which take precedence over `source`; see `files`. With "tfds:<name>", an
        empty folder or a folder that contains a folder <name> is TFDS's data_dir instead.
      split: a split of TFDS, or "train", "test", … for `files`. Brackets select a part as in TFDS:
        "train[:1500]", "train[90%:]".
      manual_dir: see `tfds`.

    Raises:
      UserError: the source does not exist, or has no images.
    """
    name = source.removeprefix("tfds:")
    if source.startswith("tfds:") and (not path or _is_tfds_folder(Path(path).expanduser(), name)):
        return tfds(name, data_dir=path, manual_dir=manual_dir, split=split)
    split, bounds = _parse_split(split)
    if source == "digits" and not path:
        return _part(digits(split), bounds)
    if source == "files" and not path:
        raise UserError("config.data.path is empty: give a folder, a zip or an idx file, --config.data.path=…")
    file = Path(path or source).expanduser().absolute()
    if file.exists():
        return _part(files(file, split), bounds)
    if path:
        raise UserError(f"config.data.path={path!r} does not exist: give a folder, a zip or an idx file")
    raise UserError(f"config.data.source={source!r} must be 'digits', 'tfds:<name>', 'files' or an existing path")


def _parse_split(split):
    """Returns (name, (start, stop) or None) of a split such as "train" or "train[10%:500]"."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"config.data.split={split!r} must be a name, or a part of a split as in 'train[:90%]'")
    name, start, stop = match.groups()
    return name, (start, stop) if "[" in split else None


def _part(source, bounds):
    """Returns the images of a source from start to stop, which are numbers or percentages as in TFDS."""
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


# ---------------------------------------------------------------- files


def digits(split: str = "train") -> Source:
    """Returns the 1,797 handwritten digits, 8×8, that scikit-learn ships.

    Raises:
      UserError: the split is not "train".
    """
    if split != "train":
        raise UserError(f"config.data.split={split!r}: the digits have only 'train': give it, or a part of it")
    return Source(
        "digits", "scikit-learn", 1797, "digit {}".format, lambda i: _digits()[0][i], lambda i: _digits()[1][i]
    )


@functools.cache
def _digits():
    """Returns (images uint8 [1797, 8, 8, 1], labels [1797])."""
    from sklearn.datasets import load_digits  # the import takes a second, and no other source needs it

    dataset = load_digits()  # pixels in 0..16
    return np.rint(dataset.images * 255 / 16).astype(np.uint8)[..., None], dataset.target


def files(file: Path, split: str = "train") -> Source:
    """Returns the images of a folder, a zip, an idx file, or a folder with MNIST's idx files.

    Folders and zips are searched recursively, and their images sorted by name. If some images are in a folder
    named `split`, the others are left out. If the images have more than one parent folder, these are the classes.

    Raises:
      UserError: there is no image, or no folder of that split; or a zip or an idx file is damaged.
    """
    if idx_file := _idx_file(file, split):
        return idx(idx_file)
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


def idx(file: Path) -> Source:
    """Returns the images of a file in LeCun's idx format, which may be gzipped.

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


def _idx_file(path, split):
    """Returns `path` if it is an idx file, or the idx file of the split in a folder, or None."""
    stem = {"train": "train", "test": "t10k"}.get(split, split)
    candidates = [path] if path.is_file() else [path / f"{stem}-images-idx3-ubyte{end}" for end in (".gz", "")]
    return next((file for file in candidates if re.search(r"idx\d-ubyte", file.name) and file.is_file()), None)


def _is_image(path):
    """Returns True for the suffix of an image. Hidden files are not images: macOS leaves ._x.jpg beside x.jpg."""
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
    """Returns the pixels of an image as a viewer shows it, uint8 [H, W, 1] if it is grey, else [H, W, 3].

    Applies the orientation of the EXIF data and the palette, lays transparent parts on white, and reduces
    16 bits to 8.

    Raises:
      ValueError: the image has more than MAX_PIXELS.
      Exception: Pillow cannot decode the image; the types are many.
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


# ---------------------------------------------------------------- TensorFlow Datasets


def tfds(name: str, *, data_dir: str = "", manual_dir: str = "", split: str = "train") -> Source:
    """Returns a TFDS data set, stored as array_record.

    Reading a prepared data set does not need TensorFlow. Preparing one does, and happens here if necessary.

    Args:
      name: e.g. "celeb_a" or "lsun/church_outdoor".
      data_dir: the folder of TFDS's data sets; "" is ~/tensorflow_datasets.
      manual_dir: a folder of files that TFDS then does not download, under the names that it expects.
      split: in the notation of TFDS, e.g. "train", "test", "train+validation" or "train[:90%]".

    Raises:
      UserError: the data set or the split does not exist, has no images, or cannot be prepared.
    """
    import tensorflow_datasets  # noqa: TID251 (half a second, and no other source needs it)

    try:
        builder = tensorflow_datasets.builder(name, data_dir=_folder_or_none(data_dir), file_format="array_record")
    except Exception as error:  # of many types; the message lists the names of all data sets
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"config.data.source='tfds:{name}' is not a TFDS data set ({line}): see tensorflow.org/datasets"
        ) from None
    features = builder.info.features
    image_keys = [key for key in features if isinstance(features[key], tensorflow_datasets.features.Image)]
    if not image_keys:
        raise UserError(
            f"config.data.source='tfds:{name}' has no images, only {', '.join(features)}: choose another data set"
        )
    examples = _examples(builder, name, split, manual_dir)

    # The same thread reads the label right after the image, so the cache saves a second decoding.
    element = functools.lru_cache(maxsize=2 * (os.cpu_count() or 1))(examples.__getitem__)
    has_classes = isinstance(dict(features).get("label"), tensorflow_datasets.features.ClassLabel)
    return Source(
        f"tfds:{builder.info.full_name}/{split}",
        f"{builder.info.full_name}/{split}/{len(examples)}",
        len(examples),
        lambda i: f"tfds:{name}/{split}[{i}]",
        lambda i: _from_array(element(i)[image_keys[0]]),
        (lambda i: int(element(i)["label"])) if has_classes else None,
        features["label"].names if has_classes else (),
    )


def _from_array(image):
    """Returns uint8 [H, W, 1 or 3] unchanged, and any other image as `pixels` does."""
    if image.dtype == np.uint8 and image.shape[-1] in (1, 3):
        return image
    return pixels(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))


def _examples(builder, name, split, manual_dir):
    """Returns TFDS's random-access source of the split, and prepares the data set if it is necessary and possible."""
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"config.data.source='tfds:{name}': {builder.data_path} is stored as {builder.info.file_format.value}, "
            "which has no random access: prepare it as array_record in another folder (config.data.path)"
        ) from None
    except Exception as error:  # KeyError, ValueError or AttributeError, which depends on the version of TFDS
        if builder.is_prepared():
            splits = ", ".join(builder.info.splits)
            raise UserError(
                f"config.data.split={split!r} is not a split of tfds:{name} ({error}): give one of {splits}"
            ) from None
    _prepare(builder, name, manual_dir)
    return builder.as_data_source(split)


def _prepare(builder, name, manual_dir):
    """Downloads and prepares the data set. Raises UserError if TensorFlow is missing, or a step fails."""
    own_files = "give the images as a folder or a zip, --config.data.path=…"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"config.data.source='tfds:{name}' is not prepared in {builder.data_path}, and there is no "
            "TensorFlow to prepare it: pip install -r requirements-prepare.txt (best in another environment), or "
            f"{own_files}"
        )
    from tensorflow_datasets import download  # noqa: TID251 (the import is slow)

    print(f"preparing tfds:{name} in {builder.data_path}")
    config = download.DownloadConfig(manual_dir=_folder_or_none(manual_dir))
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # no network, a quota of Google Drive, a wrong checksum, files to download by hand, …
        reason = one_line(error, 300)
        raise UserError(
            f"config.data.source='tfds:{name}' cannot be prepared ({type(error).__name__}: {reason}): put the files "
            f"into a folder and give it, --config.data.manual_dir=… (now {manual_dir!r}), or {own_files}"
        ) from None


def _is_tfds_folder(path, name):
    """Returns True for a folder that TFDS may use: it has a folder of the data set, or is empty."""
    return path.is_dir() and ((path / name.split("/")[0].split(":")[0]).is_dir() or not any(path.iterdir()))


def _folder_or_none(path):
    """Returns the absolute path, or None for ""."""
    return str(Path(path).expanduser().absolute()) if path else None
