"""Arrays in [−1, 1] to pictures that a person can look at."""

import math

import numpy as np
from etils import epath
from PIL import Image  # noqa: TID251 (Pillow writes the pictures)

MIN_TILE = 64  # pixels: smaller images are enlarged to about this size in a grid


def to_uint8(x) -> np.ndarray:
    """float [..., C] in [−1, 1], clipped, to uint8 0..255 of the same shape."""
    return np.rint((np.clip(np.asarray(x), -1, 1) + 1) * 127.5).astype(np.uint8)


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


def to_pillow(x) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def save_png(path, x) -> None:
    """Writes uint8 [H, W, 1 or 3] as PNG, making the folder where it is missing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        to_pillow(x).save(file, format="PNG")
