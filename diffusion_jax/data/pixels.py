"""The two scales of images: uint8 on disk and in the input pipeline, [−1, 1] in the mathematics.

Arrays of other numbers are float32 in [−1, 1] from their source on.
"""

from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def from_uint8(pixels: Array) -> Array:
    """Maps the levels 0..255 of uint8 to float32 in [−1, 1], and returns float32 as it is; NumPy or JAX as `pixels`."""
    return pixels.astype(np.float32) / 127.5 - 1 if pixels.dtype == np.uint8 else pixels


def to_range(x: jax.typing.ArrayLike, low: float, high: float) -> np.ndarray:
    """Maps [−1, 1] to low..high: float32 of the same shape."""
    return (low + (np.asarray(x, np.float64) + 1) / 2 * (high - low)).astype(np.float32)


def to_uint8(x: jax.typing.ArrayLike) -> np.ndarray:
    """Clips to [−1, 1] and rounds to the nearest of the levels 0..255: uint8 of the same shape."""
    return np.rint((np.clip(np.asarray(x), -1, 1) + 1) * 127.5).astype(np.uint8)
