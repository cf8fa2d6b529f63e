import gzip
import struct

import numpy as np
import pytest

from diffusion_jax.data import sources
from diffusion_jax.errors import UserError


def save_idx(path, array, compress=False):
    raw = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.mark.parametrize("compress", [True, False])
def test_images_and_labels_of_idx_files(tmp_path, compress):
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5), np.uint8)
    end = ".gz" * compress
    save_idx(tmp_path / "mnist" / f"train-images-idx3-ubyte{end}", images, compress)
    save_idx(tmp_path / "mnist" / f"train-labels-idx1-ubyte{end}", np.arange(7, dtype=np.uint8), compress)
    save_idx(tmp_path / "mnist" / f"t10k-images-idx3-ubyte{end}", images[:2], compress)
    for path in (tmp_path / "mnist", tmp_path / "mnist" / f"train-images-idx3-ubyte{end}"):
        source = sources.open_source("files", str(path))
        np.testing.assert_array_equal([source[i][..., 0] for i in range(7)], images)
        assert [source.label(i) for i in range(7)] == list(range(7))
    test = sources.open_source("files", str(tmp_path / "mnist"), split="test")
    assert len(test) == 2 and test.label is None


def test_errors_name_the_file(tmp_path):
    save_idx(tmp_path / "labels-idx1-ubyte", np.zeros(1, np.uint8))
    (tmp_path / "cut-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100))[:20])
    save_idx(tmp_path / "odd" / "train-images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    save_idx(tmp_path / "odd" / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    for name, message in (
        ("labels-idx1-ubyte", "not an idx file of uint8 images"),
        ("cut-idx3-ubyte.gz", "cannot be read"),
        ("odd", "3 labels for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source("files", str(tmp_path / name))
