"""The handwritten digits of scikit-learn."""

import functools

import numpy as np

from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError


def digits(split: str = "train") -> Source:
    """Returns the 1,797 handwritten digits, 8×8, that scikit-learn ships.

    Raises:
      UserError: the split is not "train".
    """
    if split != "train":
        raise UserError(f"config.data.split={split!r}: the digits have only 'train': give 'train', or a part of it")
    return Source(
        "digits",
        "scikit-learn",
        1797,
        "digit {}".format,
        lambda i: _digits()[0][i],
        lambda i: _digits()[1][i],
        "0123456789",
    )


@functools.cache
def _digits():
    """Returns (images uint8 [1797, 8, 8, 1], labels [1797])."""
    from sklearn.datasets import load_digits  # the import takes a second, and no other source needs it

    dataset = load_digits()  # pixels in 0..16
    return np.rint(dataset.images * 255 / 16).astype(np.uint8)[..., None], dataset.target
