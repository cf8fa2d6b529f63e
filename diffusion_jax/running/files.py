"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing, and renames it to `path` when the block ends without an error.

    Readers of `path` see its old or its new content, never a part of it. The new content is on disk before
    the rename. A missing folder is created. An error leaves `path` unchanged.
    The temporary name is random: processes in containers may share a host name and a process number.

    Raises:
      OSError: the file cannot be written, or `path` is a folder.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if "://" not in str(path):  # a bucket has no file descriptor; closing stores the object
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` in UTF-8, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())
