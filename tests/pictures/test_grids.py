import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import pixels
from diffusion_jax.pictures import grids


def test_to_uint8_is_the_inverse_of_the_normalisation():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pixels.to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)


def test_to_uint8_clips():
    assert pixels.to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_grid_enlarges_small_images_and_separates_them():
    sheet = grids.grid(np.full((5, 8, 8, 1), 255, np.uint8))
    assert sheet.shape == (2 * 68 + 4, 3 * 68 + 4, 1)  # 2 rows of 3 tiles of 64 pixels, with gaps of 4 pixels
    white = sheet[..., 0] == 255
    assert white[4:68, 4:68].all() and not white[:4].any() and not white[:, 68:72].any()
    assert (sheet[72:136, 140:204] == 128).all()  # there is no sixth image


def test_grid_keeps_the_pixels_of_large_images():
    x = np.random.default_rng(0).integers(0, 256, (2, 80, 64, 3), np.uint8)
    sheet = grids.grid(x, columns=1)
    np.testing.assert_array_equal(sheet[5:85, 5:69], x[0])
    np.testing.assert_array_equal(sheet[90:170, 5:69], x[1])


def test_labels_of_narrow_images_do_not_overlap():
    labels = ["RePaint 1", "RePaint 2", "RePaint 3"]
    narrow = grids.labelled(np.zeros((3, 16, 4, 1), np.uint8), [""], labels)
    above = narrow[: 2 * grids.LABEL, :, 0].min(axis=0) < 128  # columns of pixels with ink
    words = np.flatnonzero(np.diff(above.astype(int)) == 1)
    spaces = np.diff(words)
    assert (spaces > grids.LABEL).sum() == len(labels) - 1  # a wide space between two labels


def test_png_has_the_saved_pixels(tmp_path):
    for channels in (1, 3):
        x = np.random.default_rng(0).integers(0, 256, (4, 6, channels), np.uint8)
        grids.save_png(tmp_path / "new" / "x.png", x)
        saved = np.asarray(Image.open(tmp_path / "new" / "x.png"))
        np.testing.assert_array_equal(saved.reshape(x.shape), x)


def test_save_png_takes_what_a_sampler_returns(tmp_path):
    x = np.linspace(-1, 1, 2 * 64 * 64 * 3, dtype=np.float32).reshape(2, 64, 64, 3)
    grids.save_png(tmp_path / "grid.png", x)
    grids.save_png(tmp_path / "one.png", x[1])
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "one.png") as one:
        assert grid.size == (2 * 68 + 4, 72) and one.size == (64, 64)
        assert np.asarray(one)[-1, -1].tolist() == [255] * 3
        np.testing.assert_array_equal(np.asarray(grid)[4:68, 72:136], np.asarray(one))
    with pytest.raises(ValueError, match=r"x has shape \(64, 64\): give an image \[H, W, 1 or 3\], or several"):
        grids.save_png(tmp_path / "no.png", x[0, :, :, 0])
