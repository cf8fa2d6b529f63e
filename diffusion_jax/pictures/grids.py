"""Pictures made from arrays: contact sheets, labelled grids, PNG files and animations."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont  # noqa: TID251 (Pillow writes the pictures)

from diffusion_jax.data import pixels
from diffusion_jax.running import files

MIN_TILE = 64  # pixels: a grid enlarges smaller images to about this size
LABEL = 14  # pixels: font size of the labels


def grid(x: np.ndarray, columns: int | None = None, width: float = 0) -> np.ndarray:
    """Returns a contact sheet of images, with grey gaps between them.

    Images smaller than MIN_TILE, or narrower than `width`, are enlarged by an integer factor, bicubic.

    Args:
      x: uint8 [N, H, W, C], of which `visible` channels are shown.
      columns: images in a row; None makes the sheet about square.
      width: the least width of an image in pixels.

    Returns:
      uint8 [height, width, 1 or 3].
    """
    x = x[..., : visible(x.shape[-1])]
    num, rows, cols, channels = x.shape
    columns = columns or math.ceil(math.sqrt(num))
    scale = max(1, round(MIN_TILE / max(rows, cols)), math.ceil(width / cols))
    gap, (rows, cols) = max(2, scale * max(rows, cols) // 16), (scale * rows, scale * cols)
    sheet = np.full((-(-num // columns) * (rows + gap) + gap, columns * (cols + gap) + gap, channels), 128, np.uint8)
    for i, image in enumerate(x):
        large = to_pillow(image).resize((cols, rows), Image.Resampling.BICUBIC)
        top, left = (i // columns) * (rows + gap) + gap, (i % columns) * (cols + gap) + gap
        sheet[top : top + rows, left : left + cols] = np.asarray(large).reshape(rows, cols, channels)
    return sheet


def visible(channels: int) -> int:
    """Returns the number of channels that a picture shows: the first three, or the first of two."""
    return 3 if channels >= 3 else 1


def labelled(x: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str]) -> np.ndarray:
    """Returns `grid` of the images with a label to the left of each row and above each column.

    Args:
      x: uint8 [rows · columns, H, W, C].
      row_labels: one for each row.
      column_labels: one for each column.

    Returns:
      uint8 [height, width, 1 or 3].
    """
    font = ImageFont.load_default(LABEL)
    sheet = grid(x, len(column_labels), width=max(map(font.getlength, column_labels)))
    left = math.ceil(max(font.getlength(label) for label in row_labels)) + LABEL
    top = LABEL * 2
    picture = Image.new("L" if sheet.shape[-1] == 1 else "RGB", (sheet.shape[1] + left, sheet.shape[0] + top), "white")
    picture.paste(to_pillow(sheet), (left, top))
    draw = ImageDraw.Draw(picture)
    height, width = sheet.shape[0] / len(row_labels), sheet.shape[1] / len(column_labels)
    for i, label in enumerate(row_labels):
        draw.text((left - LABEL / 2, top + (i + 0.5) * height), label, fill="black", font=font, anchor="rm")
    for i, label in enumerate(column_labels):
        draw.text((left + (i + 0.5) * width, top / 2), label, fill="black", font=font, anchor="mm")
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def by_class(x: np.ndarray, classes: Sequence[str], labels: np.ndarray | None = None) -> np.ndarray:
    """Returns `grid` of the images without classes, else a row for each class that occurs, with its name.

    Args:
      x: uint8 [N, H, W, C].
      classes: the names of the classes; () for none.
      labels: int [N]; None: image i has class i mod len(classes). A label of len(classes) means no class.
    """
    if not classes:
        return grid(x)
    labels = np.arange(len(x)) % len(classes) if labels is None else labels
    rows = [x[labels == label] for label in np.unique(labels)]
    columns = max(map(len, rows))
    filled = [np.concatenate([row, np.full((columns - len(row), *x.shape[1:]), 128, np.uint8)]) for row in rows]
    names = [*classes, "none"]
    return labelled(np.concatenate(filled), [names[label] for label in np.unique(labels)], [""] * columns)


def save_animation(path: epath.PathLike, frames: Iterable[np.ndarray]) -> None:
    """Writes an animation that loops for ever, and creates its folder. The last frame stays for 2 seconds.

    Args:
      path: a .gif or .webp file.
      frames: uint8 [H, W, 1 or 3] each.
    """
    first, *rest = map(to_pillow, frames)
    durations = [80] * len(rest) + [2000]  # milliseconds
    with files.replacing(path) as file:
        first.save(
            file,
            format=epath.Path(path).suffix[1:],
            save_all=True,
            append_images=rest,
            duration=durations,
            loop=0,
            minimize_size=True,
        )


def to_pillow(x: np.ndarray) -> Image.Image:
    """Returns uint8 [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def save_png(path: epath.PathLike, x: ArrayLike) -> None:
    """Writes an image [H, W, 1 or 3], or a `grid` of images [N, H, W, 1 or 3], as a PNG file; creates its folder.

    Args:
      x: uint8, or floats in [−1, 1], as samplers return them.

    Raises:
      ValueError: `x` has another shape.
    """
    x = np.asarray(x)
    if x.ndim not in (3, 4) or x.shape[-1] not in (1, 3) or not x.size:
        raise ValueError(f"x has shape {x.shape}: give an image [H, W, 1 or 3], or several, [N, H, W, 1 or 3]")
    x = x if x.dtype == np.uint8 else pixels.to_uint8(x)
    x = grid(x) if x.ndim == 4 else x
    with files.replacing(epath.Path(path).expanduser()) as file:
        to_pillow(x).save(file, format="PNG")


def is_readable(path: epath.Path) -> bool:
    """True if `path` is a whole picture."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # Pillow's errors for a cut or damaged file
        return False
    return True
