import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import inception
from tools import convert_inception, inception_fixture

pytestmark = pytest.mark.slow

NAME = "Mixed_7c.branch3x3dbl_3b.conv.weight"
NOT_OURS = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}


def fake_torch(monkeypatch, state):
    """Replaces torch by a module whose `load` returns `state` for any file."""
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=lambda file, **_: state))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Converts random weights: (features, checksum, file)."""
    folder = tmp_path_factory.mktemp("inception")
    (folder / "weights.pth").write_bytes(b"")
    file = str(folder / "weights.npz")
    weights = inception_fixture.random_weights(inception.shapes())
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_torch(monkeypatch, weights | NOT_OURS | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7)})
        convert_inception.convert(str(folder / "weights.pth"), file)
    return *inception.load_features(file), file


# ---------------------------------------------------------------- against torch-fidelity


def test_features_equal_those_of_torch_fidelity(loaded):
    features, *_ = loaded
    with np.load(inception_fixture.FILE) as file:
        expected = file["features"]
    actual = features(inception_fixture.random_images())
    assert actual.dtype == jnp.float32 and actual.shape == (2, 2048)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.max())


def test_grey_is_three_equal_channels(loaded):
    features, *_ = loaded
    grey = inception_fixture.random_images()[..., :1]
    np.testing.assert_allclose(features(grey), features(grey.repeat(3, axis=-1)), rtol=1e-5, atol=1e-5)


def test_names_and_number_of_the_weights():
    shapes = inception.shapes()
    assert len(shapes) == 5 * 94
    assert sum(math.prod(shape) for shape in shapes.values()) == 21_785_568 + 2 * 17_216  # parameters, statistics
    assert shapes[NAME] == (384, 384, 3, 1)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)


def test_convolutions_are_float32_on_every_device():
    image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    model = inception.InceptionV3()
    text = jax.jit(model.apply).lower(jax.eval_shape(model.init, jax.random.key(0), image), image).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(lines) == 94
    assert all(line.count("HIGHEST") == 2 for line in lines)


# ---------------------------------------------------------------- the resize of TensorFlow 1


@pytest.mark.parametrize(
    "row, expected",
    [
        ([0, 10], [0, 5, 10, 10]),  # with half-pixel centres: 0, 2.5, 7.5, 10
        ([0, 10, 50, 60, 90, 20, 30, 70], [0, 50, 90, 30]),  # antialiasing would mix in the other pixels
        ([8, 0, 200, 255], [8, 0, 200, 255]),
    ],
)
def test_resize_of_a_row(row, expected):
    image = np.tile(np.array(row, np.uint8), (len(row), 1))
    for axes in ((0, 1), (1, 0)):
        actual = inception.resize(jnp.asarray(image.transpose(axes)[None, :, :, None]), size=4)
        np.testing.assert_array_equal(actual[0, :, :, 0].transpose(axes), np.tile(np.float32(expected), (4, 1)))


def test_resize_is_bilinear_between_source_pixels():
    x = np.random.default_rng(0).uniform(0, 255, (2, 5, 17, 3)).astype(np.float32)
    size = 11

    def pixel(i, j):
        (y, dy), (z, dz) = (divmod(k * length / size, 1) for k, length in ((i, 5), (j, 17)))
        rows, columns = ([int(k), min(int(k) + 1, length - 1)] for k, length in ((y, 5), (z, 17)))
        weights = np.outer([1 - dy, dy], [1 - dz, dz])
        return np.einsum("ab,nabc->nc", weights, x[:, rows][:, :, columns])

    expected = np.array([[pixel(i, j) for j in range(size)] for i in range(size)]).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(inception.resize(jnp.asarray(x), size), expected, atol=1e-3)


# ---------------------------------------------------------------- the weights file


def test_converted_file_has_only_the_arrays_of_the_network(loaded):
    with np.load(loaded[2]) as file:
        assert set(file.files) == set(inception.shapes())


def test_checksum_depends_on_names_shapes_and_values(loaded):
    checksum = loaded[1]
    assert len(checksum) == 64 and int(checksum, 16)
    a = np.zeros((2, 3), np.float32)
    variants = [{"a": a}, {"b": a}, {"a": a.T}, {"a": a + 1}, {"a": a, "b": a}]
    assert len({inception._checksum(arrays) for arrays in variants}) == len(variants)
    assert inception._checksum({"a": a, "b": a}) == inception._checksum({"b": a, "a": a})


def test_errors_name_the_file_and_the_array(tmp_path):
    file = tmp_path / "weights.npz"

    def error():
        with pytest.raises(UserError) as raised:
            inception.load_features(file)
        message = str(raised.value)
        assert str(file) in message and "tools.convert_inception" in message and "\n" not in message
        return message

    assert "does not exist" in error()
    file.write_bytes(b"PK, but no more")
    assert "damaged" in error()
    first, second, *_ = inception.shapes().items()
    np.savez(file, **{first[0]: np.zeros(first[1], np.float32)})
    assert f"lacks the array {second[0]}:" in error()
    np.savez(file, **{first[0]: np.zeros(5, np.float32)})
    assert f"{first[0]} as float32 (5,), not float32 {first[1]}" in error()
    np.savez(file, **{first[0]: np.zeros(first[1])})
    assert f"{first[0]} as float64" in error()


def test_images_of_four_channels_are_refused(loaded):
    with pytest.raises(UserError, match="4 channels"):
        loaded[0](np.zeros((1, 8, 8, 4), np.uint8))


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "not FID's Inception"),
        ({"fc.weight": np.zeros((1000, 2048))}, "not FID's Inception"),  # torchvision's
        ([1], "not a state dict"),
    ],
)
def test_other_weights_are_not_converted(tmp_path, monkeypatch, state, message):
    fake_torch(monkeypatch, state)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=rf"weights\.pth is .*{message}"):
        convert_inception.convert(str(tmp_path / "weights.pth"), str(tmp_path / "weights.npz"))


def test_conversion_without_torch_or_file(tmp_path, monkeypatch):
    file, out = str(tmp_path / "weights.pth"), str(tmp_path / "weights.npz")
    fake_torch(monkeypatch, NOT_OURS)
    with pytest.raises(UserError, match="No such file"):
        convert_inception.convert(file, out)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"must end in \.npz"):
        convert_inception.convert(file, file)
    with pytest.raises(UserError, match="cannot be written"):
        convert_inception.convert(file, str(tmp_path / "nowhere" / "weights.npz"))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["convert_inception", file, out])
    with pytest.raises(SystemExit, match="torch is missing"):
        convert_inception.main()
