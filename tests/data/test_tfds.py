import numpy as np
import pytest
import tensorflow_datasets

from diffusion_jax.data import sources, tfds
from diffusion_jax.errors import UserError


def test_tfds_without_tensorflow(tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=5):
        for name, shape, classes in (
            ("mnist", (28, 28, 1), 10),
            ("cifar10", (32, 32, 3), 10),
            ("celeb_a", (218, 178, 3), 0),
        ):
            source = sources.open_source(f"tfds:{name}", str(tmp_path))  # empty: for TFDS
            assert len(source) == 5
            assert source[4].shape == shape and source[4].dtype == np.uint8
            assert len(source.classes) == classes
            assert all(0 <= source.label(i) < classes for i in range(5 if classes else 0))


def test_alpha_of_tfds():
    """Alpha is kept or laid on white; images without it stay."""
    image = np.full((2, 2, 4), [10, 20, 30, 0], np.uint8)
    np.testing.assert_array_equal(tfds._from_array(image, alpha=True), image)
    np.testing.assert_array_equal(tfds._from_array(image, alpha=False), np.full((2, 2, 3), 255))
    np.testing.assert_array_equal(tfds._from_array(image[..., :3], alpha=True), image[..., :3])


def test_tfds_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)  # no TensorFlow
    with pytest.raises(UserError, match=r"not prepared in .*requirements-prepare\.txt.*folder or a zip") as error:
        tfds.tfds("celeb_a", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a TFDS data set") as error:
        tfds.tfds("no_such_set", data_dir=str(tmp_path))
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="has no images, only text, label"):
        tfds.tfds("imdb_reviews", data_dir=str(tmp_path))


def test_tfds_prepares_with_tensorflow(tmp_path, monkeypatch):
    """Records the call of TFDS, and raises the error that TFDS raises without a network."""
    calls = []

    def download_and_prepare(_, *, download_config, file_format):
        calls.append((download_config.manual_dir, file_format))
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    with pytest.raises(UserError, match=r"cannot be prepared \(ConnectionError: no network and more lines\).*zip"):
        tfds.tfds("mnist", data_dir=str(tmp_path), manual_dir=str(tmp_path / "own"))
    assert [(str(folder), kind) for folder, kind in calls] == [(str(tmp_path / "own"), "array_record")]
