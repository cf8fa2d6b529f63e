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
CURVE = (128, 64)  # pixels: width and height of the picture of a signal
_COLOURS = ("black", "red", "royalblue", "orange", "green", "purple")  # of a signal's channels, in turn
LABEL = 14  # pixels: font size of the labels
MOST_CHANNELS = 8  # rows of one channel each that a grid shows
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels: Pillow's mode, which a PNG can hold


def grid(x: np.ndarray, columns: int | None = None, width: float = 0, has_alpha: bool = True) -> np.ndarray:
    """Returns a contact sheet of images, with grey gaps between them.

    Images smaller than MIN_TILE, or narrower than `width`, are enlarged by an integer factor, bicubic.

    Args:
      x: uint8 [N, H, W, C], signals or volumes, see `tiles`. 1, 3 and 4 channels are grey, RGB and RGBA. Of another
        number each channel is a grey image, up to MOST_CHANNELS: each row of images becomes a row for each channel.
      columns: images in a row; None makes the sheet about square.
      width: the least width of an image in pixels.
      has_alpha: False shows the four channels of an array, none of which is alpha, in rows.

    Returns:
      uint8 [height, width, 1, 3 or 4].
    """
    x = tiles(x)
    in_rows = not _is_colour(x, has_alpha)
    shown = min(x.shape[-1], MOST_CHANNELS) if in_rows else 1  # images for each image
    columns = columns or min(len(x), math.ceil(math.sqrt(len(x) * shown)))
    x = _rows_of_channels(x, columns) if in_rows else x
    num, rows, cols, channels = x.shape
    scale = max(1, round(MIN_TILE / max(rows, cols)), math.ceil(width / cols))
    gap, (rows, cols) = max(2, scale * max(rows, cols) // 16), (scale * rows, scale * cols)
    sheet = _grey((-(-num // columns) * (rows + gap) + gap, columns * (cols + gap) + gap, channels), has_alpha)
    for i, image in enumerate(x):
        large = to_pillow(image).resize((cols, rows), Image.Resampling.BICUBIC)
        top, left = (i // columns) * (rows + gap) + gap, (i % columns) * (cols + gap) + gap
        sheet[top : top + rows, left : left + cols] = np.asarray(large).reshape(rows, cols, channels)
    return sheet


def tiles(x: np.ndarray) -> np.ndarray:
    """Returns images [N, H, W, C] as they are, and signals and volumes as the images that a grid shows of them.

    Args:
      x: uint8 [N, H, W, C]; signals [N, L, C], drawn as curves from 0 at the bottom to 255 at the top, a colour for
        each channel; or volumes [N, D, H, W, C], of which the middle slice is shown.
    """
    if x.ndim == 3:
        return np.stack([_curves(signal) for signal in x])
    return x[:, x.shape[1] // 2] if x.ndim == 5 else x


def _curves(signal):
    """Returns the picture of a signal uint8 [L, C], drawn four times as large to be smooth."""
    width, height = (4 * size for size in CURVE)
    picture = Image.new("RGB", (width, height), "white")
    draw, across = ImageDraw.Draw(picture), np.linspace(0, width - 1, len(signal))
    for k, channel in enumerate(signal.T):
        points = np.stack([across, (1 - channel / 255) * (height - 1)], axis=1)
        draw.line(points.ravel().tolist(), fill=_COLOURS[k % len(_COLOURS)], width=6, joint="curve")
    return np.asarray(picture.reduce(4))


def drawn_as(axes: int) -> str:
    """Returns how a grid shows images of so many axes, to follow their name: "" for images."""
    return {1: ", as curves", 2: "", 3: ", the middle slice of each"}[axes]


def _is_colour(x, has_alpha):
    """Returns True for images that are shown as a whole, not channel by channel."""
    return x.shape[-1] in (MODES if has_alpha else (1, 3))


def _rows_of_channels(x, columns):
    """Returns the channels as images [M, H, W, 1]; those of `columns` images at a time are ordered by the channel."""
    x = np.pad(x[..., :MOST_CHANNELS], ((0, -len(x) % columns), (0, 0), (0, 0), (0, 0)), constant_values=128)
    rows = x.reshape(-1, columns, *x.shape[1:])
    return np.moveaxis(rows, -1, 1).reshape(-1, *x.shape[1:3], 1)


def _grey(shape, has_alpha):
    """Returns grey and opaque images uint8 [..., C]."""
    x = np.full(shape, 128, np.uint8)
    if has_alpha and shape[-1] == 4:
        x[..., 3] = 255
    return x


def labelled(
    x: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str], has_alpha: bool = True
) -> np.ndarray:
    """Returns `grid` of the images with a label to the left of each row and above each column.

    Args:
      x: uint8 [rows · columns, H, W, C], or see `tiles`.
      row_labels: one for each row.
      column_labels: one for each column.
      has_alpha: see `grid`.

    Returns:
      uint8 [height, width, 1, 3 or 4].
    """
    font = ImageFont.load_default(LABEL)
    sheet = grid(x, len(column_labels), width=max(map(font.getlength, column_labels)), has_alpha=has_alpha)
    left = math.ceil(max(font.getlength(label) for label in row_labels)) + LABEL
    top = LABEL * 2
    picture = Image.new(MODES[sheet.shape[-1]], (sheet.shape[1] + left, sheet.shape[0] + top), "white")
    picture.paste(to_pillow(sheet), (left, top))
    draw = ImageDraw.Draw(picture)
    height, width = sheet.shape[0] / len(row_labels), sheet.shape[1] / len(column_labels)
    for i, label in enumerate(row_labels):
        draw.text((left - LABEL / 2, top + (i + 0.5) * height), label, fill="black", font=font, anchor="rm")
    for i, label in enumerate(column_labels):
        draw.text((left + (i + 0.5) * width, top / 2), label, fill="black", font=font, anchor="mm")
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def by_class(
    x: np.ndarray, classes: Sequence[str], labels: np.ndarray | None = None, has_alpha: bool = True
) -> np.ndarray:
    """Returns `grid` of the images without classes, else a row for each class that occurs, with its name.

    Args:
      x: uint8 [N, H, W, C], or see `tiles`.
      classes: the names of the classes; () for none.
      labels: int [N]; None: image i has class i mod len(classes). A label of len(classes) means no class.
      has_alpha: see `grid`.
    """
    if not classes:
        return grid(x, has_alpha=has_alpha)
    x, labels = tiles(x), np.arange(len(x)) % len(classes) if labels is None else labels
    rows = [x[labels == label] for label in np.unique(labels)]
    columns = max(map(len, rows))
    filled = [np.concatenate([row, _grey((columns - len(row), *x.shape[1:]), has_alpha)]) for row in rows]
    names = [*classes, "none"]
    row_labels = [names[label] for label in np.unique(labels)]
    return labelled(np.concatenate(filled), row_labels, [""] * columns, has_alpha)


def save_animation(path: epath.PathLike, frames: Iterable[np.ndarray]) -> None:
    """Writes an animation that loops for ever, and creates its folder. The last frame stays for 2 seconds.

    Args:
      path: a .gif or .webp file.
      frames: uint8 [H, W, 1, 3 or 4] each; transparent parts are laid on white, because frames of a GIF lie above
        each other.
    """
    first, *rest = map(_on_white, frames)
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


def _on_white(x):
    image = to_pillow(x)
    return image if image.mode != "RGBA" else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def to_pillow(x: np.ndarray) -> Image.Image:
    """Returns uint8 [H, W, 1, 3 or 4] as a Pillow image."""
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def save_png(path: epath.PathLike, x: ArrayLike) -> None:
    """Writes an image [H, W, 1, 3 or 4], or a `grid` of images [N, H, W, C], as a PNG file; creates its folder.

    Signals need `grid` first, because [N, L, C] looks like an image. Of volumes [N, D, H, W, C] it draws a grid.

    Args:
      x: uint8, or floats in [−1, 1], as samplers return them.

    Raises:
      ValueError: `x` has another shape.
    """
    x = pixels.to_uint8(np.asarray(x))
    if x.ndim not in (3, 4, 5) or (x.ndim == 3 and x.shape[-1] not in MODES) or not x.size:
        raise ValueError(f"x has shape {x.shape}: give an image [H, W, 1, 3 or 4], or several, [N, H, W, C]")
    x = grid(x) if x.ndim > 3 else x
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
