"""Files that appear whole or not at all."""

import contextlib
import io
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from diffusion_jax.errors import UserError, one_line


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file beside `path` for writing, and renames it to `path` when the block ends without an error.

    Readers of `path` see its old or its new content, never a part of it. The new content is on disk before
    the rename. A missing folder is created. An error leaves `path` unchanged.
    The temporary name is random: processes in containers may share a host name and a process number.
    An object of a bucket appears whole in any case, so the content is collected in memory and written at once.

    Raises:
      OSError: the file cannot be written, or `path` is a folder.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if "://" in str(path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a folder beside `path`, and renames it to `path` when the block ends without an error.

    A killed process leaves only a folder `.<name>.<random>.partial`, which nothing reads. A bucket cannot rename a
    folder: there the block writes to `path` itself.

    Raises:
      OSError: the folder cannot be written, or `path` is neither missing nor an empty folder.
    """
    path = epath.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty")
    partial = path if "://" in str(path) else _partial(path)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if partial != path:
            os.replace(partial, path)  # epath refuses to replace an empty folder
    except BaseException:
        with contextlib.suppress(OSError):
            partial.rmtree()
        raise


def check_writable(path: epath.PathLike, flag: str) -> None:
    """Makes and removes a file beside `path`, so that a long computation does not end at a path it cannot write.

    Raises:
      UserError: no file can be made there; the message begins with `flag`.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"{flag} cannot be written ({one_line(error)}): give another name") from None


def _partial(path):
    """Returns a temporary name beside `path`."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` in UTF-8, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())
