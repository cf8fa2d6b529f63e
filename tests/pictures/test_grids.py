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
    assert pixels.to_uint8(np.uint8([[3]])).tolist() == [[3]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint64", "int64"])
def test_to_range_rounds_integers_and_never_wraps(dtype):
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    wide = pixels.to_range(np.array([-1.5, -1, 0, 1, 1.5], np.float32), least, most, dtype)
    assert wide.dtype == dtype and wide[0] == wide[1] == least and wide[3] == wide[4]
    assert np.diff(wide.astype(float)).min() == 0 and most - int(wide[4]) <= most / 2**52
    beyond = pixels.to_range(np.array([-1, 1], np.float32), least - 100, most + 100, dtype)
    assert beyond.tolist() == [wide[0], wide[4]]
    few = pixels.to_range(np.linspace(-1.2, 1.2, 50), 3, 7, dtype)
    assert sorted(set(few.tolist())) == [3, 4, 5, 6, 7]
    levels = np.arange(0, 120, dtype=dtype)
    np.testing.assert_array_equal(pixels.to_range(levels / np.float32(60) - 1, 0, 120, dtype), levels)


def test_to_range_keeps_floats():
    x = np.array([-1.1, -1, 0.25, 1], np.float32)
    y = pixels.to_range(x, -3, 7)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [-3.5, -3, 3.25, 7], rtol=1e-6)


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


@pytest.mark.parametrize("channels, shown", [(2, 2), (4, 4), (12, grids.MOST_CHANNELS)])
def test_other_channels_have_a_row_each(channels, shown):
    """Three images in rows of two: below each row of images the channels, from the first on."""
    x = np.random.default_rng(0).integers(0, 256, (3, 64, 64, channels), np.uint8)
    sheet = grids.grid(x, columns=2, has_alpha=False)
    assert sheet.shape == (2 * shown * 68 + 4, 2 * 68 + 4, 1)
    for row in range(2 * shown):
        for column in range(2):
            tile = sheet[4 + row * 68 :, 4 + column * 68 :][:64, :64, 0]
            image, channel = row // shown * 2 + column, row % shown
            np.testing.assert_array_equal(tile, x[image, ..., channel] if image < 3 else np.full((64, 64), 128))
    square = grids.grid(x, has_alpha=False)
    assert max(square.shape[:2]) < 4 * min(square.shape[:2])


def test_four_channels_are_rgba(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 4), np.uint8)
    x[..., 3] //= 2
    sheet = grids.grid(x)
    assert sheet.shape == (140, 140, 4) and (sheet[:4] == [128, 128, 128, 255]).all()
    np.testing.assert_array_equal(sheet[4:68, 72:136], x[1])
    classes = grids.by_class(x, ["a", "b"])  # two of a, one of b
    assert classes.shape[-1] == 4 and (classes[:4] == 255).all()
    assert (classes[-8, -8] == [128, 128, 128, 255]).all()
    grids.save_png(tmp_path / "one.png", x[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "one.png")), x[0])
    grids.save_animation(tmp_path / "x.gif", [np.zeros((8, 8, 4), np.uint8)])
    with Image.open(tmp_path / "x.gif") as frames:
        assert frames.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_labels_of_narrow_images_do_not_overlap():
    labels = ["RePaint 1", "RePaint 2", "RePaint 3"]
    narrow = grids.labelled(np.zeros((3, 16, 4, 1), np.uint8), [""], labels)
    above = narrow[: 2 * grids.LABEL, :, 0].min(axis=0) < 128  # columns of pixels with ink
    words = np.flatnonzero(np.diff(above.astype(int)) == 1)
    spaces = np.diff(words)
    assert (spaces > grids.LABEL).sum() == len(labels) - 1  # a wide space between two labels


def test_png_has_the_saved_pixels(tmp_path):
    for channels in (1, 3, 4):
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
    for wrong in (x[0, :, :, 0], x[0, :, :, :2]):
        with pytest.raises(ValueError, match=r"x has shape .*: give an image \[H, W, 1, 3 or 4\], or several, \[N, H"):
            grids.save_png(tmp_path / "no.png", wrong)


def test_a_signal_is_a_curve_from_0_at_the_bottom_to_255_at_the_top():
    width, height = grids.CURVE
    steps = np.repeat(np.uint8([[0], [255], [51]]), [32, 32, 64], axis=0)[None]  # 0, then 1, then a fifth of the height
    (picture,) = grids.tiles(steps)
    assert picture.shape == (height, width, 3)
    rows = picture[..., 0].argmin(axis=0)  # the darkest of each column
    assert set(rows[2:30]) <= {height - 1, height - 2} and set(rows[34:62]) <= {0, 1}
    np.testing.assert_allclose(rows[68:], 0.8 * (height - 1), atol=1)


def test_each_channel_of_a_signal_has_a_colour():
    levels = np.broadcast_to(np.uint8([40, 90, 150, 210]), (1, 8, 4))
    (picture,) = grids.tiles(levels)
    column = picture[:, 60].astype(int)
    drawn = [column[round((1 - level / 255) * (grids.CURVE[1] - 1))] for level in (40, 90, 150, 210)]
    assert len({tuple(colour // 64) for colour in drawn} - {(3, 3, 3)}) == 4


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_of_a_volume_the_middle_slice_is_shown(channels):
    """Its channels are shown as those of an image."""
    x = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6, channels), np.uint8)
    np.testing.assert_array_equal(grids.tiles(x), x[:, 2])
    np.testing.assert_array_equal(grids.grid(x, has_alpha=False), grids.grid(x[:, 2], has_alpha=False))


@pytest.mark.parametrize("shape", [(16, 1), (4, 8, 8, 1)])
def test_grids_of_classes_take_signals_and_volumes(shape):
    """The row of the smaller class ends in a grey field."""
    x = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    sheet, labels = grids.by_class(x, ["a", "b"], np.array([0, 0, 1])), ["a", "b"]
    shown = grids.tiles(x)
    grey = np.full((1, *shown.shape[1:]), 128, np.uint8)
    np.testing.assert_array_equal(sheet, grids.labelled(np.concatenate([shown, grey]), labels, ["", ""]))
