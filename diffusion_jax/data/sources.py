"""Where images come from: one function per kind of source, each returns a `Source`.

Reading gives the pictures as a person sees them: upright, grey or RGB, on white, of any size.
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
MAX_PIXELS = 50_000_000  # of one image: a PNG of 200 kB can unpack to gigabytes
MAX_BYTES = 500_000_000  # of one file in a zip, unpacked


@dataclasses.dataclass(frozen=True)
class Source:
    """Images by number: len(source), source[i] -> uint8 [H, W, 1 or 3], of any H and W.

    Reading an image that is damaged or absurdly large raises whatever its decoder raises.
    """

    origin: str  # for people: the file or the name of the data set
    version: str  # for machines: other names, files or releases have another
    num: int
    name: Callable[[int], str]  # of an image, for messages
    read: Callable[[int], np.ndarray]
    label: Callable[[int], int] | None = None  # the class of image i, where the source has classes
    classes: Sequence[str] = ()  # their names, where they have names

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return self.read(i)


def open_source(source: str, path: str, *, split: str = "train", manual_dir: str = "") -> Source:
    """The source that config.data names.

    Args:
      source: "digits"; "tfds:<name>"; or "files", those at `path`; or the path itself.
      path: own files, which go before any `source`: see `files`. For a TFDS data set also the
        folder where TFDS keeps it, i.e. one that has a folder <name>, or is empty.
      split: of TFDS, or "train", "test", … of `files`, all with a part of it in brackets if wanted, as
        TFDS writes it: "train[:1500]", "train[90%:]".
      manual_dir: see `tfds`.

    Raises:
      UserError: no such source, or nothing in it.
    """
    name = source.removeprefix("tfds:")
    if source.startswith("tfds:") and (not path or _keeps_tfds(Path(path).expanduser(), name)):
        return tfds(name, data_dir=path, manual_dir=manual_dir, split=split)
    split, part = _parsed(split)
    if source == "digits" and not path:
        return _part(digits(split), part)
    if source == "files" and not path:
        raise UserError("config.data.path is empty: give the folder, zip or idx file, --config.data.path=…")
    file = Path(path or source).expanduser().absolute()
    if file.exists():
        return _part(files(file, split), part)
    if path:
        raise UserError(f"config.data.path={path!r} does not exist: give a folder, a zip or an idx file")
    raise UserError(f"config.data.source={source!r} must be 'digits', 'tfds:<name>', 'files' or an existing path")


def _parsed(split):
    """(name, (start, stop) or None) of "train" or "train[10%:500]"."""
    found = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not found:
        raise UserError(f"config.data.split={split!r} must be a name, or a part of it as in 'train[:90%]'")
    name, start, stop = found.groups()
    return name, (start, stop) if "[" in split else None


def _part(source, part):
    """The images of a source from start to stop, numbers or percentages as TFDS counts them."""
    if part is None:
        return source

    def number(text, default):
        if text is None:
            return default
        return round(int(text[:-1]) * source.num / 100) if text.endswith("%") else int(text)

    taken = range(source.num)[number(part[0], 0) : number(part[1], source.num)]
    if not taken:
        raise UserError(f"config.data.split: [{part[0] or ''}:{part[1] or ''}] of {source.num} images holds none")
    return dataclasses.replace(
        source,
        version=f"{source.version}[{taken.start}:{taken.stop}]",
        num=len(taken),
        name=lambda i: source.name(taken[i]),
        read=lambda i: source.read(taken[i]),
        label=source.label and (lambda i: source.label(taken[i])),
    )


# ---------------------------------------------------------------- files


def digits(split: str = "train") -> Source:
    """The 1,797 handwritten digits, 8×8, that scikit-learn ships."""
    if split != "train":
        raise UserError(f"config.data.split={split!r}: the digits have the split 'train' alone")
    return Source(
        "digits", "scikit-learn", 1797, "digit {}".format, lambda i: _digits()[0][i], lambda i: _digits()[1][i]
    )


@functools.cache
def _digits():
    """(uint8 [1797, 8, 8, 1], labels [1797]); only here is scikit-learn imported, which takes a second."""
    from sklearn.datasets import load_digits

    found = load_digits()  # 0..16
    return np.rint(found.images * 255 / 16).astype(np.uint8)[..., None], found.target


def files(file: Path, split: str = "train") -> Source:
    """A folder or a zip of images, an idx file, or a folder with MNIST's idx files.

    Folders and zips are searched recursively, in the order of the names; if some of their
    images are in a folder named `split`, only those are taken. The folders right above the
    images are the classes, if there is more than one.

    Raises:
      UserError: no image, or no folder of that split; a damaged archive or idx file.
    """
    if idx_file := _idx_file(file, split):
        return idx(idx_file)
    found = folder(file, split) if file.is_dir() else archive(file, split)
    if not found.num:
        raise UserError(f"config.data.path='{file}' holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


def folder(root: Path, split: str = "train") -> Source:
    """A folder of images, see `files`."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if _is_image(path))
    names = _of_split(names, split, root)
    stats = [(root / name).stat() for name in names]

    def read(i):
        with Image.open(root / names[i]) as image:
            return pixels(image)

    label, classes = _labels(names)
    version = _sha256([names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]])
    return Source(str(root), version, len(names), names.__getitem__, read, label, classes)


def archive(file: Path, split: str = "train") -> Source:
    """A zip of images, see `files`."""
    try:
        unpacked = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"config.data.path='{file}' is no folder, zip or idx file") from None
    members = {m.filename: m for m in unpacked.infolist() if _is_image(PurePosixPath(m.filename))}
    names = _of_split(sorted(members), split, file)

    def read(i):
        member = members[names[i]]
        if member.file_size > MAX_BYTES:
            raise ValueError(f"{member.file_size} bytes unpacked are more than {MAX_BYTES}")
        with Image.open(io.BytesIO(unpacked.read(member))) as image:
            return pixels(image)

    label, classes = _labels(names)
    version = _sha256([names, [members[name].CRC for name in names]])
    return Source(str(file), version, len(names), names.__getitem__, read, label, classes)


def idx(file: Path) -> Source:
    """LeCun's format, gzip'ed or not; labels from the file beside it, …labels-idx1… for …images-idx3…."""
    images, labels = _read_idx(file, 3), None
    labels_file = file.with_name(file.name.replace("images-idx3", "labels-idx1"))
    if labels_file != file and labels_file.is_file():
        labels = _read_idx(labels_file, 1)
        if labels.shape != images.shape[:1]:
            raise UserError(f"config.data.path: {labels_file} has {len(labels)} labels for {len(images)} images")
    return Source(
        str(file),
        hashlib.sha256(images).hexdigest(),
        len(images),
        lambda i: f"{file.name}[{i}]",
        lambda i: images[i, ..., None],
        None if labels is None else labels.__getitem__,
    )


def _read_idx(file, dimensions):
    """0 0 8 (uint8), the number of dimensions, their sizes as big-endian int32, then the bytes."""
    raw = file.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"not an idx file of uint8 {'images' if dimensions == 3 else 'labels'}")
        shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"config.data.path: {file} cannot be read ({error}): fetch it again") from None


def _idx_file(path, split):
    """The idx file that `path` is, or that of the split in the folder, or None."""
    stem = {"train": "train", "test": "t10k"}.get(split, split)
    candidates = [path] if path.is_file() else [path / f"{stem}-images-idx3-ubyte{end}" for end in (".gz", "")]
    return next((file for file in candidates if re.search(r"idx\d-ubyte", file.name) and file.is_file()), None)


def _is_image(path):
    """By its suffix; "._x.jpg" is what macOS leaves beside x.jpg."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _of_split(names, split, where):
    """The names in a folder called `split`; all of them if there is none, and "train" is asked for."""
    chosen = [name for name in names if split in PurePosixPath(name).parts[:-1]]
    if not chosen and split != "train":
        raise UserError(f"config.data.split={split!r}: '{where}' has no images in a folder of that name")
    return chosen or names


def _labels(names):
    """(label of i, classes) from the folders of the images; (None, ()) if they are all in one."""
    parents = [PurePosixPath(name).parent.name for name in names]
    classes = sorted(set(parents))
    if len(classes) < 2:
        return None, ()
    number = {name: k for k, name in enumerate(classes)}
    return lambda i: number[parents[i]], classes


def _sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


def pixels(image: Image.Image) -> np.ndarray:
    """A picture as a person sees it, uint8 [H, W, 1] if it is grey, else [H, W, 3].

    Turned as its EXIF data says, palettes resolved, transparent parts laid on white, 16 bits cut to 8.

    Raises:
      ValueError: more than MAX_PIXELS.
      Exception: whatever Pillow raises for damaged files, of many types.
    """
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
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
    """A data set of TFDS, e.g. "celeb_a" or "lsun/church_outdoor", kept as array_record.

    What is prepared is read without TensorFlow. What is not is prepared, if TensorFlow can be imported.

    Args:
      data_dir: where TFDS keeps its data sets; "" is ~/tensorflow_datasets.
      manual_dir: where files lie that TFDS need not fetch, under the names it knows.
      split: as TFDS writes them, e.g. "train", "test", "train+validation" or "train[:90%]".

    Raises:
      UserError: no such data set, not one of images, no such split, or not prepared and no way to do it.
    """
    import tensorflow_datasets  # noqa: TID251 (the room of TFDS; half a second, and not all need it)

    try:
        builder = tensorflow_datasets.builder(name, data_dir=_folder_or_none(data_dir), file_format="array_record")
    except Exception as error:  # of many types, and pages of names
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"config.data.source='tfds:{name}' is no data set of TFDS ({first})") from None
    features = builder.info.features
    image_keys = [key for key in features if isinstance(features[key], tensorflow_datasets.features.Image)]
    if not image_keys:
        raise UserError(f"config.data.source='tfds:{name}' has no images, but {', '.join(features)}: choose another")
    examples = _examples(builder, name, split, manual_dir)

    # The label is asked for right after the image, by the same thread: both come from one decoding.
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
    """uint8 [H, W, 1 or 3] as it is; alpha laid on white, 16 bits cut to 8."""
    if image.dtype == np.uint8 and image.shape[-1] in (1, 3):
        return image
    return pixels(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))


def _examples(builder, name, split, manual_dir):
    """TFDS's random-access source of the split, prepared where that is needed and possible."""
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"config.data.source='tfds:{name}': {builder.data_path} is kept as {builder.info.file_format.value}, which "
            "has no random access: prepare it as array_record in another folder (config.data.path)"
        ) from None
    except Exception as error:  # KeyError, ValueError, AttributeError, by the version of TFDS
        if builder.is_prepared():
            splits = ", ".join(builder.info.splits)
            raise UserError(f"config.data.split={split!r} is none of tfds:{name}: {splits} ({error})") from None
    _prepare(builder, name, manual_dir)
    return builder.as_data_source(split)


def _prepare(builder, name, manual_dir):
    own_files = "give the images as a folder or a zip, --config.data.path=…"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"config.data.source='tfds:{name}' is not prepared in {builder.data_path}, and preparing it needs "
            f"TensorFlow: pip install -r requirements-prepare.txt (best in another environment), or {own_files}"
        )
    from tensorflow_datasets import download  # noqa: TID251 (the room of TFDS)

    print(f"preparing tfds:{name} in {builder.data_path}")
    config = download.DownloadConfig(manual_dir=_folder_or_none(manual_dir))
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # no network, a quota page of Google Drive, a checksum, files to fetch by hand, ...
        reason = one_line(error, 300)
        raise UserError(
            f"config.data.source='tfds:{name}' cannot be prepared ({type(error).__name__}: {reason}): put the files "
            f"where config.data.manual_dir={manual_dir!r} says, or {own_files}"
        ) from None


def _keeps_tfds(path, name):
    """Whether the folder is TFDS's: it has a folder of that data set, or nothing yet."""
    return path.is_dir() and ((path / name.split("/")[0].split(":")[0]).is_dir() or not any(path.iterdir()))


def _folder_or_none(path):
    return str(Path(path).expanduser().absolute()) if path else None
