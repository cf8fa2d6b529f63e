"""The handwritten digits of scikit-learn."""

import functools
import importlib.metadata

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
    # The file that sklearn.datasets.load_digits reads; the import of scikit-learn takes a second.
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), np.int64, delimiter=",")  # 64 pixels in 0..16, and the label
    return np.rint(table[:, :64] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1), table[:, 64]
