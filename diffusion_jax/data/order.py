"""The order of the data: a function of (seed, position) that the input pipeline and a program on a device share."""

import jax
import numpy as np
from jax import lax

_ROUNDS = 6  # of the network; four are enough where the round function is random (Luby & Rackoff 1988)


def shuffled(position, num: int, seed: int):
    """Which of `num` examples stands at `position` of an endless stream that holds each once an epoch.

    Each epoch is a permutation of its own: a Feistel network on the smallest power of four that holds
    `num`, walked along until it comes back below `num` (Black & Rogaway 2002). So an entry costs the
    same whatever `num` is, and nothing is kept or sorted.

    Args:
      position: int [n], 0 <= position < 2^32, NumPy, or JAX inside a program: the numbers are the same.
      num: at least 1.
      seed: 0 <= seed < 2^32.

    Returns:
      int32 [n] in 0..num-1, of the kind of `position`.
    """
    position = position.astype(np.uint32)
    epoch, index = position // np.uint32(num), position % np.uint32(num)
    half = max(1, -(-(num - 1).bit_length() // 2))  # bits
    mask = np.uint32(2**half - 1)
    keys = [_mix(epoch ^ _mix(_word(seed, i))) for i in range(_ROUNDS)]

    def permuted(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right

    def back(x):  # those that are still outside go on
        return where(x < num, x, permuted(x))

    if isinstance(position, jax.Array):
        where = jax.numpy.where
        x = lax.while_loop(lambda x: (x >= num).any(), back, permuted(index))
    else:
        where, x = np.where, permuted(index)
        while (x >= num).any():
            x = back(x)
    return x.astype(np.int32)


def _word(seed, i):
    """A word for round i: an array, as NumPy warns of scalars that wrap around."""
    return np.array([(seed + i * 0x9E3779B9) % 2**32], np.uint32)


def _mix(x):
    """Scrambles uint32 words one to one: the finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
