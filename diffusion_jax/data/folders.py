"""The user's own images: folders, zips, idx files and Parquet files."""

import collections
import hashlib
import io
import os
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath

from diffusion_jax.data.decode import SUFFIXES, decode
from diffusion_jax.data.idx import idx, idx_file
from diffusion_jax.data.parquet import is_parquet, parquet
from diffusion_jax.data.source import Source, printable
from diffusion_jax.errors import UserError

MAX_BYTES = 500_000_000  # bytes of the largest file in a zip, unpacked
# Folders of systems and servers, with thumbnails or copies. Those that begin with a dot are left out too.
_HELPERS = {"@eadir", "__macosx", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("extra", "unlabeled", "unlabelled"), "extra"),
}
_SPLIT_WORD = re.compile(rf"(?:^|[^A-Za-z])((?i:{'|'.join(_SPLITS)}))(?![a-z])")  # also that of trainA


def files(file: Path, split: str = "train", *, only_parquet: bool = False, alpha: bool = False) -> Source:
    """Returns the images of a folder, a zip, an idx file, a folder with MNIST's idx files, or Parquet files.

    Folders and zips are searched recursively, through links, and their images sorted by name. Hidden files, and the
    folders of helpers such as @eaDir, are left out. Folders called train, val, test, … beside each other, in any case,
    are splits, and only the images of `split` are used. If the images have more than one parent folder, these are the
    classes. Prints one line that says what was taken and what was left out.

    A folder with Parquet files and no images is read as the hub lays it out. The name of a file, or of its folder,
    begins with its split: data/train-00000-of-00002.parquet, train/0000.parquet. Without such names, "train" is
    everything.

    Args:
      file: the file or the folder.
      split: "train", "test", … or another name that the folders or the Parquet files have.
      only_parquet: True leaves out the images in a folder, which illustrate a data set of the hub.
      alpha: True keeps the alpha of pictures, see `decode.pixels`.

    Raises:
      UserError: there is no image or no folder of that split, or a file or folder cannot be read.
    """
    left_out: collections.Counter[str] = collections.Counter()
    folders: list[str] = []
    try:
        if path := idx_file(file, split):
            source = idx(path)
        elif is_parquet(file):
            source = _tables(file, [file.name], split, left_out, alpha)
        elif file.is_dir():
            source, folders = folder(file, split, left_out, only_parquet, alpha)
        else:
            source, folders = archive(file, split, left_out, alpha)
    except OSError as error:
        raise UserError(f"config.data.path='{file}' cannot be read ({error}): check its permissions") from None
    others = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(12))
    if not source.num:
        raise UserError(
            f"config.data.path='{file}' holds no images{f' (only {others})' if others else ''}: give a folder or a zip "
            f"with {', '.join(sorted(SUFFIXES))} files"
        )
    classes = f"in {len(source.classes)} classes" if source.classes else "with labels" if source.label else "unlabelled"
    print(
        f"{source.origin}: {source.num} images {classes}"
        + (f" from {', '.join(printable(name) or '.' for name in folders[:4])}" if any(folders) else "")
        + (f" and {len(folders) - 4} more folders" if len(folders) > 4 else "")
        + (f"; left out: {others}" if others else "")
    )
    return source


def folder(
    root: Path, split: str, left_out: collections.Counter[str], only_parquet: bool = False, alpha: bool = False
) -> tuple[Source, list[str]]:
    """Returns (the images of a folder, the folders that hold them), and counts the files that it leaves out."""
    stats = {} if only_parquet else dict(_walk(root, left_out))
    if only_parquet or (not stats and left_out[".parquet"]):
        left_out.clear()
        tables = sorted(name for name, _ in _walk(root, left_out, suffixes={".parquet"}))
        return _tables(root, tables, split, left_out, alpha), []
    names = _names_of_split(sorted(stats), split, root, left_out)
    version = _sha256([names, [(stats[name].st_size, stats[name].st_mtime_ns) for name in names]])
    return _source(root, version, names, lambda name: root / name, alpha)


def archive(
    file: Path, split: str, left_out: collections.Counter[str], alpha: bool = False
) -> tuple[Source, list[str]]:
    """Returns (the images of a zip, the folders that hold them), and counts the files that it leaves out."""
    if not file.is_file():  # to open a pipe would wait forever
        raise UserError(f"config.data.path='{file}' must be a folder, a zip or an idx file, or Parquet")
    try:
        unpacked = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"config.data.path='{file}' must be a folder, a zip or an idx file, or Parquet") from None
    members = {}
    for member in unpacked.infolist():
        name = member.filename.replace("\\", "/")  # programs of Windows write backslashes
        if reason := "" if member.is_dir() else _reason_against(name):
            left_out[reason] += 1
        elif not member.is_dir():
            members[name] = member
    names = _names_of_split(sorted(members), split, file, left_out)
    version = _sha256([names, [members[name].CRC for name in names]])
    return _source(file, version, names, lambda name: io.BytesIO(_unpack(unpacked, members[name])), alpha)


def _tables(path, names, split, left_out, alpha):
    """Returns the images of a split of Parquet files; `path` is the file, or the folder that contains the names."""
    names = _tables_of_split(names, split, path, left_out)
    return parquet([path / name if path.is_dir() else path for name in names], path, alpha)


def _source(path, version, names, opened, alpha):
    """Returns (a source, its folders), where opened(name) is a path or a file."""
    several = set()  # images of which only the first frame is read

    def read(i):
        image, has_more = decode(opened(names[i]), alpha)
        if has_more:
            several.add(i)
        return image

    folders = [name.rpartition("/")[0] for name in names]
    parents = [folder.rpartition("/")[2] for folder in folders]
    classes = sorted(set(parents))
    numbers = {name: k for k, name in enumerate(classes)}
    labelled = len(classes) > 1
    source = Source(
        printable(str(path)),
        version,
        len(names),
        lambda i: printable(names[i]),
        read,
        (lambda i: numbers[parents[i]]) if labelled else None,
        [printable(name) for name in classes] if labelled else (),
        lambda: len(several),
    )
    return source, sorted(set(folders))


# ---------------------------------------------------------------- which files


def _walk(folder, left_out, prefix="", above=frozenset(), suffixes=SUFFIXES):
    """Yields (name, stat) of the images below a folder. Follows links, unless they lead back to a folder above."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        left_out["links to a folder above"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:  # a broken link: its decoder will report it
                status = entry.stat(follow_symlinks=False)
            is_folder, reason = stat.S_ISDIR(status.st_mode), _reason_against(entry.name, suffixes)
            if is_folder and reason != "hidden":
                yield from _walk(entry.path, left_out, f"{prefix}{entry.name}/", above | {here}, suffixes)
            elif reason:
                left_out[reason] += 1
            elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                yield prefix + entry.name, status
            else:
                left_out["pipes or devices"] += 1


def _reason_against(name, suffixes=SUFFIXES):
    """Returns why a file is left out, by the parts of its name; "" for one with one of the suffixes."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part.lower() in _HELPERS for part in path.parts):
        return "hidden"
    suffix = path.suffix.lower()
    return "" if suffix in suffixes else printable(suffix) or "without a suffix"


def _names_of_split(names, split, path, left_out):
    """Returns the names in the folders of a split; all names if the split is "train" and there are no splits."""
    folders = {name.rpartition("/")[0] for name in names}
    children = collections.defaultdict(set)
    for parts in (folder.split("/") for folder in folders if folder):
        for i, part in enumerate(parts):
            children["/".join(parts[:i])].add(part)
    splits = {above: _split_folders(below, split) for above, below in children.items()}
    found = {folder: _split_of(folder, splits) for folder in folders}
    present = sorted(set(found.values()) - {""})
    if not present and split == "train":
        return names
    chosen = [part for part in present if part.lower() == split.lower()]
    chosen = chosen or [part for part in present if _SPLITS.get(split.lower()) in _kinds(part)]
    if not chosen:
        has = f"one that it has, {', '.join(present)}" if present else "a split that it has"
        raise UserError(f"config.data.split={split!r}: '{path}' has no images in a folder of that name: give {has}")
    taken = [name for name in names if found[name.rpartition("/")[0]] in chosen]
    if len(taken) < len(names):
        left_out[f"outside {' and '.join(map(printable, chosen))}"] = len(names) - len(taken)
    return taken


def _tables_of_split(names, split, path, left_out):
    """Returns those names of Parquet files that are of a split; all if the split is "train" and none names a split."""
    found = {name: split_of_table(name, split) for name in names}
    present = sorted(set(found.values()) - {""})
    asked = _SPLITS.get(split.lower(), split)
    if not present and asked == "train":
        return names
    taken = [name for name in names if found[name] == asked]
    if not taken:
        has = f"one that it has, {', '.join(present)}" if present else "train, which is everything"
        raise UserError(f"config.data.split={split!r}: '{path}' has no Parquet files of that name: give {has}")
    if len(taken) < len(names):
        left_out[f"outside {printable(split)}"] = len(names) - len(taken)
    return taken


def split_of_table(name: str, split: str = "") -> str:
    """Returns the split with which the name of a Parquet file, or else of its folder, begins; "" for none.

    Args:
      name: a path such as "data/train-00000-of-00002.parquet".
      split: a split of another name than train, test, …, if there is one.
    """
    for part in reversed(name.split("/")):
        word = re.split(r"\W", part, maxsplit=1)[0].lower()
        if (stem := word.rstrip("_0123456789")) in _SPLITS:  # also train_0
            return _SPLITS[stem]
        if split and word == split.lower():
            return split
    return ""


def _split_of(folder, splits):
    """Returns the first part of a folder's path that is a split, or ""."""
    parts = folder.split("/")
    return next((part for i, part in enumerate(parts) if part in splits.get("/".join(parts[:i]), ())), "")


def _split_folders(folders, split):
    """Returns those of some folders beside each other that are splits, not classes; a class may be called "train".

    They are splits if two of them are called as two splits are, or if all have such words in their names (train2017,
    val2017). A folder alone is one if `split` asks for it, and so is any folder if `split` is a name of its own.
    """
    named = {folder for folder in folders if folder.lower() in _SPLITS}
    if split.lower() not in _SPLITS:
        return {folder for folder in folders if folder.lower() == split.lower()}
    if len({_SPLITS[folder.lower()] for folder in named}) > 1:
        return named
    if all(map(_kinds, folders)) and len(set().union(*map(_kinds, folders))) > 1:
        return folders
    return {folder for folder in named if len(folders) == 1 and _SPLITS[folder.lower()] == _SPLITS[split.lower()]}


def _kinds(name):
    """Returns the splits whose words are in the name of a folder."""
    return {_SPLITS[word.lower()] for word in _SPLIT_WORD.findall(name)}


def _sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _unpack(unpacked, member):
    """Returns the bytes of a member of a zip, and unpacks no more than it says it has.

    Raises:
      ValueError: it has more than MAX_BYTES, or a compression that zipfile unpacks without a limit.
    """
    if member.file_size > MAX_BYTES:
        raise ValueError(f"{member.file_size} bytes unpacked are more than the limit of {MAX_BYTES}")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression {member.compress_type} is not read from a zip: make the zip with deflate")
    with unpacked.open(member) as file:
        return file.read(member.file_size + 1)  # beyond the end, to check the checksum
