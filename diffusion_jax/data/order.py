"""The order of the training examples, a function of (seed, position) for the input pipeline and for device programs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

_ROUNDS = 6  # of the Feistel network; four suffice if the round function is random (Luby & Rackoff 1988)


def shuffled(position: np.ndarray | jax.Array, num: int, seed: int) -> np.ndarray | jax.Array:
    """Returns the indices of the examples at `position` in an endless stream of shuffled epochs.

    Each epoch is a permutation of its own. A Feistel network permutes the smallest power of four that is at
    least `num`, and cycle walking restricts the permutation to 0..num-1 (Black & Rogaway 2002). The cost of
    an index does not depend on `num`, and no permutation is stored.

    Args:
      position: int [n], 0 <= position < 2^32. NumPy arrays and JAX arrays give the same numbers.
      num: number of examples, at least 1.
      seed: 0 <= seed < 2^32.

    Returns:
      int32 [n] in 0..num-1, a NumPy or a JAX array as `position` is.
    """
    position = position.astype(np.uint32)
    epoch, index = position // np.uint32(num), position % np.uint32(num)
    half = max(1, -(-(num - 1).bit_length() // 2))  # bits
    mask = np.uint32(2**half - 1)
    keys = [_mix(epoch ^ _mix(_word(seed, i))) for i in range(_ROUNDS)]
    where: Callable[..., Any]  # NumPy's or JAX's, to match `position`

    def permuted(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right

    def walked(x):  # one step of cycle walking
        return where(x < num, x, permuted(x))

    if isinstance(position, jax.Array):
        where = jax.numpy.where
        x = lax.while_loop(lambda x: (x >= num).any(), walked, permuted(index))
    else:
        where, x = np.where, permuted(index)
        while (x >= num).any():
            x = walked(x)
    return x.astype(np.int32)


def _word(seed, i):
    """Returns the word of round i as an array: NumPy warns if a scalar overflows."""
    return np.array([(seed + i * 0x9E3779B9) % 2**32], np.uint32)


def _mix(x):
    """Scrambles uint32 words one to one: the finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
