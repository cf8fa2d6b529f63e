"""The type of all sources of images, and how their names are printed."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """A sequence of images: source[i] is uint8 or float32 [H, W, C] of any H and W, i < len(source).

    Pixels of pictures are those that a viewer shows: uint8, upright, grey or RGB, on white; or RGBA. Arrays may have
    any number of channels, be float32 in [−1, 1], and be signals [L, C] or volumes [D, H, W, C]. A damaged image raises
    the error of its decoder, and an image beyond the limits of `decode` and `folders` raises ValueError.
    """

    origin: str  # the file or the data set, for messages
    version: str  # identifies the names, files and release, for the cache
    num: int  # images
    name: Callable[[int], str]  # the name of image i, for messages
    read: Callable[[int], np.ndarray]  # the pixels of image i
    label: Callable[[int], int] | None = None  # the class of image i; None without classes
    classes: Sequence[str] = ()  # the names of the classes; () without classes
    several: Callable[[], int] = lambda: 0  # images read so far that have more frames or pages than the first
    dtype: str = "uint8"  # or float32
    array_dtype: str = ""  # the type of an array's own numbers, that of the integers or "float32"; "" for pictures

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(i)


def printable(name: str) -> str:
    """Returns a name of one line that can be printed: escapes line ends and bytes that are not UTF-8."""
    return name if name.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
