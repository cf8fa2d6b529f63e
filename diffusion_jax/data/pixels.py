"""The two scales of images: uint8 on disk and in the input pipeline, [−1, 1] in the mathematics.

Arrays of other numbers are float32 in [−1, 1] from their source on.
"""

import math
from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def from_uint8(pixels: Array) -> Array:
    """Maps the levels 0..255 of uint8 to float32 in [−1, 1], and returns float32 as it is; NumPy or JAX as `pixels`."""
    return pixels.astype(np.float32) / 127.5 - 1 if pixels.dtype == np.uint8 else pixels


def to_range(x: jax.typing.ArrayLike, low: float, high: float, dtype: str = "float32") -> np.ndarray:
    """Maps [−1, 1] to low..high, the data.range of an array: `dtype` of the same shape.

    Integers are rounded to nearest and bounded by low..high.
    """
    values = low + (np.asarray(x, np.float64) + 1) / 2 * (high - low)
    if np.issubdtype(dtype, np.integer):
        # float64 lacks the largest integers of 64 bits: takes the largest that it has below 2^63 or 2^64
        least, most = np.iinfo(dtype).min, math.floor(np.nextafter(np.iinfo(dtype).max + 1.0, 0))
        values = np.clip(np.rint(values), max(least, math.ceil(low)), min(most, math.floor(high)))
    return values.astype(dtype)


def to_uint8(x: jax.typing.ArrayLike) -> np.ndarray:
    """Clips to [−1, 1], rounds to the nearest of the levels 0..255, and returns uint8 as it is."""
    x = np.asarray(x)
    return x if x.dtype == np.uint8 else np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
