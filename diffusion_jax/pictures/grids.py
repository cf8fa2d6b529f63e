"""Arrays in [−1, 1] to pictures that a person can look at."""

import math

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont  # noqa: TID251 (Pillow writes the pictures)

from diffusion_jax.running import files

MIN_TILE = 64  # pixels: smaller images are enlarged to about this size in a grid
LABEL = 14  # pixels: height of the letters beside it


def grid(x, columns=None) -> np.ndarray:
    """A contact sheet of uint8 [N, H, W, C]: uint8 [height, width, C].

    Images smaller than MIN_TILE are enlarged smoothly by a whole factor; grey gaps
    separate them. The sheet is about square unless `columns` says otherwise.
    """
    num, height, width, channels = x.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = -(-num // columns)
    scale = max(1, round(MIN_TILE / max(height, width)))
    gap = max(2, scale * max(height, width) // 16)
    tile_height, tile_width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * tile_height + gap, columns * tile_width + gap, channels), 128, np.uint8)
    for i, image in enumerate(x):
        large = to_pillow(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        top, left = (i // columns) * tile_height + gap, (i % columns) * tile_width + gap
        tile = np.asarray(large).reshape(height * scale, width * scale, channels)
        sheet[top : top + height * scale, left : left + width * scale] = tile
    return sheet


def labelled(x, row_labels, column_labels) -> np.ndarray:
    """`grid` of uint8 [rows · columns, H, W, C] with a name at the left of each row and above each column.

    Returns:
      uint8 [height, width, C].
    """
    sheet = grid(x, columns=len(column_labels))
    font = ImageFont.load_default(LABEL)
    left = math.ceil(max(font.getlength(label) for label in row_labels)) + LABEL
    top = LABEL * 2
    picture = Image.new("L" if x.shape[-1] == 1 else "RGB", (sheet.shape[1] + left, sheet.shape[0] + top), "white")
    picture.paste(to_pillow(sheet), (left, top))
    draw = ImageDraw.Draw(picture)
    height, width = sheet.shape[0] / len(row_labels), sheet.shape[1] / len(column_labels)
    for i, label in enumerate(row_labels):
        draw.text((left - LABEL / 2, top + (i + 0.5) * height), label, fill="black", font=font, anchor="rm")
    for i, label in enumerate(column_labels):
        draw.text((left + (i + 0.5) * width, top / 2), label, fill="black", font=font, anchor="mm")
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def save_animation(path, frames, milliseconds=80) -> None:
    """Writes uint8 [H, W, 1 or 3] frames as an endless GIF or WebP, by the ending of `path`; the last stays longer."""
    first, *rest = map(to_pillow, frames)
    durations = [milliseconds] * len(rest) + [2000]
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


def to_pillow(x) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def save_png(path, x) -> None:
    """Writes uint8 [H, W, 1 or 3] as PNG, making the folder where it is missing."""
    with files.replacing(path) as file:
        to_pillow(x).save(file, format="PNG")
