"""Images in Parquet files, as the Hugging Face hub stores data sets of images."""

import bisect
import functools
import hashlib
import io
import itertools
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.data.decode import decode
from diffusion_jax.data.source import Source, printable
from diffusion_jax.errors import UserError, one_line

MAX_BYTES = 100_000_000  # bytes of the row groups in memory; two are kept even if they take more
MAX_CLASSES = 100_000  # a larger number in a column of labels is no class
_BYTES = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view", "dictionary<values=string", "dictionary<values=large_string")


class _Columns(NamedTuple):
    image: str
    label: str | None
    classes: tuple[str, ...]  # those of the hub's metadata; () without


class _Group(NamedTuple):
    """A row group."""

    file: int  # index of its file
    number: int  # index within its file
    first: int  # the row of its file with which it begins
    rows: int
    num_bytes: int  # in memory
    is_empty: bool  # True if no row has the bytes of an image


def is_parquet(file: Path) -> bool:
    """Returns True for a file that is called .parquet or begins as one: the files in the hub's cache have no suffix."""
    if not file.is_file():
        return False
    if file.suffix.lower() == ".parquet":
        return True
    with file.open("rb") as raw:
        return raw.read(4) == b"PAR1"


def parquet(files: Sequence[Path], root: Path, alpha: bool = False) -> Source:
    """Returns the images of Parquet files, in the order of the files.

    The images are the feature Image of the hub's metadata, or else the one column of structs {bytes, path}, or else the
    one of bytes. The labels are a feature ClassLabel, or else a column label or labels of integers, or label of text.
    Labels are left out, with a printed line, if a row has no class.

    A row group is read when one of its images is. The last ones stay in memory, up to MAX_BYTES, so that images that
    are read in order are read once.

    Args:
      files: one file or more, with the same columns.
      root: the file itself, or a folder that contains the files, for names and messages.
      alpha: True keeps the alpha of pictures, see `decode.pixels`.

    Raises:
      UserError: pyarrow is missing, a file is damaged, there are no images, or there are several columns of them.
    """
    columns, groups = _open(files, root)
    names = [str(file.relative_to(root)) if file != root else file.name for file in files]
    stats = [file.stat() for file in files]
    version = repr([names, [(status.st_size, status.st_mtime_ns) for status in stats]])
    labels, classes = _labels(files, root, columns) if columns.label else (None, ())
    starts = list(itertools.accumulate((group.rows for group in groups), initial=0))
    images = _images(files, groups, columns.image)
    several = set()  # images of which only the first frame is read

    def locate(i):
        k = bisect.bisect_right(starts, i) - 1
        return k, i - starts[k]

    def name(i):
        k, row = locate(i)
        return printable(f"{names[groups[k].file]}[{groups[k].first + row}]")

    def read(i):
        k, row = locate(i)
        image, has_more = decode(io.BytesIO(_bytes(images(k)[row].as_py())), alpha)
        if has_more:
            several.add(i)
        return image

    return Source(
        printable(str(root)),
        hashlib.sha256(version.encode()).hexdigest(),
        starts[-1],
        name,
        read,
        None if labels is None else (lambda i: int(labels[i])),
        [printable(label) for label in classes],
        lambda: len(several),
    )


def _images(files, groups, column):
    """Returns a function from the index of a row group to its column of images, still encoded."""
    most = max(2, MAX_BYTES // max(group.num_bytes for group in groups))
    lock = threading.Lock()  # of several threads that need one row group, one reads it

    @functools.lru_cache(maxsize=most)
    def read(k):
        with _pyarrow(files[groups[k].file]).ParquetFile(files[groups[k].file]) as opened:
            return opened.read_row_group(groups[k].number, columns=[column])[column]

    def locked(k):
        with lock:
            return read(k)

    return locked


def _bytes(value):
    """Returns the bytes of an image: they are the value itself, or stand in a struct {bytes, path}."""
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        path = value.get("path") if isinstance(value, dict) else None
        raise ValueError(f"it has no bytes, only the path {path!r}" if path else "it is null")
    return content


# ---------------------------------------------------------------- what the files hold


def _pyarrow(file):
    """Returns pyarrow.parquet, whose import takes a third of a second."""
    try:
        from pyarrow import parquet  # noqa: TID251 (the room of pyarrow)
    except ImportError:
        raise UserError(
            f"config.data.path='{file}' is a Parquet file, which pyarrow reads: pip install pyarrow"
        ) from None
    return parquet


def _open(files, root):
    """Returns (the columns, the row groups) of all files. Closes them: a data set may have more than a process may."""
    groups, first = [], None
    for index, file in enumerate(files):
        metadata, schema = _read(file, lambda opened: (opened.metadata, opened.schema_arrow))
        columns = _columns(schema, file)
        first = first or columns
        if columns != first:
            raise UserError(
                f"config.data.path: {file} has other columns or classes than {files[0].name} ({columns.image!r} and "
                f"{columns.label!r}, {first.image!r} and {first.label!r}): give the files of one data set"
            )
        groups += _groups(metadata, index, columns.image)
    if not groups:
        raise UserError(f"config.data.path='{root}' has no rows: give Parquet files with images")
    if all(group.is_empty for group in groups):
        raise UserError(
            f"config.data.path='{root}' has no bytes in its column {columns.image!r}, at most the paths of images: "
            "give the folder of these images, or write the files with their bytes"
        )
    return first, groups


def _read(file, read):
    """Returns read(the open file)."""
    parquet = _pyarrow(file)
    try:
        with parquet.ParquetFile(file) as opened:
            return read(opened)
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
        mend = "download it again"
        raise UserError(f"config.data.path: {file} cannot be read ({one_line(error, 200)}): {mend}") from None


def _groups(metadata, file, image):
    """Returns the row groups of a file that have rows."""
    groups, first = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(k) for k in range(group.num_columns)]
        statistics = next(x.statistics for x in chunks if x.path_in_schema in (image, f"{image}.bytes"))
        is_empty = statistics is not None and statistics.has_null_count and statistics.null_count == group.num_rows
        if group.num_rows:
            groups.append(_Group(file, number, first, group.num_rows, group.total_byte_size, is_empty))
        first += group.num_rows
    return groups


def _columns(schema, file):
    """Returns the columns of the images and of the labels."""
    features = _features(schema)
    kinds = {field.name: str(field.type) for field in schema}
    integers = [name for name in ("label", "labels", *kinds) if re.fullmatch(r"u?int\d+", kinds.get(name, ""))]
    named = [name for name in integers if name in features["ClassLabel"]]
    plain = [name for name in integers if name in ("label", "labels")]
    text = ["label"] if kinds.get("label", "").startswith(_TEXT) else []
    label = next(iter(named + plain + text), None)
    classes = tuple(map(str, features["ClassLabel"].get(label, ())))
    return _Columns(_image_column(schema, features["Image"], file), label, classes)


def _features(schema):
    """Returns {"Image": {column: ()}, "ClassLabel": {column: names of the classes}} of the hub's metadata."""
    found: dict[str, dict] = {"Image": {}, "ClassLabel": {}}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for name in schema.names:
            feature = features.get(name)
            if isinstance(feature, dict) and feature.get("_type") in found:
                found[feature["_type"]][name] = feature.get("names") or ()
    except (KeyError, TypeError, AttributeError, ValueError):  # another program's files, or another form
        return {"Image": {}, "ClassLabel": {}}
    return found


def _image_column(schema, named, file):
    """Returns the name of the column of images: `named` if it can be, the one with structs, or the one with bytes."""
    types = {field.name: field.type for field in schema}
    structs = [name for name in types if _is_struct(types[name])]
    binaries = [name for name in types if str(types[name]) in _BYTES]
    found = [name for name in structs + binaries if name in named] or structs or binaries
    if len(found) == 1:
        return found[0]
    if found:
        columns = ", ".join(map(printable, found))
        raise UserError(
            f"config.data.path: {file} has several columns of images ({columns}): write files with one of them"
        )
    columns = ", ".join(printable(f"{name}: {kind}") for name, kind in types.items())
    raise UserError(
        f"config.data.path: {file} has no column of images ({one_line(columns, 300)}): give files with the bytes of "
        "images, alone or in structs {bytes, path}"
    )


def _is_struct(kind):
    """Returns True for a struct {bytes, path}."""
    fields = {kind.field(k).name: str(kind.field(k).type) for k in range(kind.num_fields)}
    return str(kind).startswith("struct<") and fields.get("bytes") in _BYTES and set(fields) <= {"bytes", "path"}


# ---------------------------------------------------------------- labels


def _labels(files, root, columns):
    """Returns (int32 [N], the names of the classes), or (None, ()) and prints why if a row has no class."""
    parts = [_read(file, lambda opened: opened.read(columns=[columns.label])[columns.label]) for file in files]
    if str(parts[0].type).startswith(_TEXT):
        texts = [part.to_pylist() for part in parts]
        classes = sorted({text for part in texts for text in part if text is not None})
        index = {text: k for k, text in enumerate(classes)} | {None: -1}
        labels = np.concatenate([np.array([index[text] for text in part], np.int64) for part in texts])
    else:
        labels = np.concatenate([part.cast("int64", safe=False).fill_null(-1).to_numpy() for part in parts])
        classes = columns.classes or range(min(int(labels.max()) + 1, MAX_CLASSES))
    without = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(without):
        print(f"{root}: the column {columns.label!r} is left out: {len(without)} of {len(labels)} rows have no class")
        return None, ()
    return labels.astype(np.int32), [str(name) for name in classes]
