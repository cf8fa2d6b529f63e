import gzip
import struct
import tracemalloc

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
    damaged = bytearray(gzip.compress(bytes(1000)))
    damaged[12] ^= 255
    (tmp_path / "spoilt-idx3-ubyte.gz").write_bytes(damaged)
    save_idx(tmp_path / "none-idx3-ubyte", np.zeros((0, 4, 4), np.uint8))
    save_idx(tmp_path / "long-idx3-ubyte.gz", np.zeros((2, 4, 4), np.uint8), compress=True)
    long = gzip.decompress((tmp_path / "long-idx3-ubyte.gz").read_bytes())
    (tmp_path / "long-idx3-ubyte.gz").write_bytes(gzip.compress(long + b"x"))
    (tmp_path / "minus-idx3-ubyte").write_bytes(long[:4] + struct.pack(">i", -1) + long[8:])
    save_idx(tmp_path / "odd" / "train-images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    save_idx(tmp_path / "odd" / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    for name, message in (
        ("labels-idx1-ubyte", "not an idx file of uint8 images"),
        ("cut-idx3-ubyte.gz", "cannot be read"),
        ("spoilt-idx3-ubyte.gz", "cannot be read"),
        ("none-idx3-ubyte", "says 0x4x4, which is empty"),
        ("minus-idx3-ubyte", "says -1x4x4, which is empty"),
        ("long-idx3-ubyte.gz", "says 32 bytes, but it has more"),
        ("odd", "3 labels for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source("files", str(tmp_path / name))


@pytest.mark.parametrize(
    "num, message", [(1, "says 784 bytes, but it has more"), (2**31 - 1, "more than the 2000000000")]
)
def test_gzip_is_unpacked_no_further_than_its_header_says(tmp_path, num, message):
    file = tmp_path / "bomb-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4B3i", 0, 0, 8, 3, num, 28, 28) + bytes(50_000_000), 1))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            sources.open_source("files", str(file))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
