import zipfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

from diffusion_jax.data import cache, sources
from diffusion_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Writes five images."""
    for i in range(5):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_digits():
    digits, expected = sources.open_source("digits", ""), load_digits()
    assert len(digits) == 1797
    assert digits[0].shape == (8, 8, 1) and digits[0].dtype == np.uint8
    images = np.stack([digits[i] for i in range(1797)])
    assert set(np.unique(images)) == {round(i * 255 / 16) for i in range(17)}
    np.testing.assert_array_equal(images[..., 0], np.rint(expected.images * 255 / 16))
    np.testing.assert_array_equal([digits.label(i) for i in range(1797)], expected.target)
    assert [digits.label(i) for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_the_source_may_be_the_path_itself(folder):
    assert len(sources.open_source(str(folder), "")) == 5


def test_path_takes_precedence_over_the_source(folder):
    for source in ("digits", "tfds:celeb_a", "files"):
        assert len(sources.open_source(source, str(folder))) == 5


def test_one_folder_has_one_source_however_its_path_is_spelled(folder, monkeypatch):
    (folder / "link").symlink_to(".")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    name = folder.name
    spellings = [str(folder), f"{folder}/", name, f"./{name}/", f"~/{name}", f"{name}/../{name}", f"{name}/link"]
    sources_ = [sources.open_source("files", spelling) for spelling in spellings]
    assert {(source.origin, source.version) for source in sources_} == {(str(folder), sources_[0].version)}


def test_paths_that_cannot_be_looked_up_do_not_exist():
    for path in ("~nobody_of_this_name/faces", "x" * 5000):
        with pytest.raises(UserError, match="does not exist"):
            sources.open_source("files", path)


def test_part_of_a_split():
    whole = sources.open_source("digits", "")
    for split, first, last in (
        ("train[:1500]", 0, 1499),
        ("train[1500:]", 1500, 1796),
        ("train[-3:]", 1794, 1796),
        ("train[50%:]", 898, 1796),
    ):
        part = sources.open_source("digits", "", split=split)
        assert len(part) == last - first + 1
        assert part.version != whole.version
        for i, k in ((0, first), (-1, last)):
            i %= len(part)
            np.testing.assert_array_equal(part[i], whole[k])
            assert (part.label(i), part.name(i)) == (whole.label(k), whole.name(k))
    with pytest.raises(UserError, match=r"\[5:3\] of 1797 images is empty"):
        sources.open_source("digits", "", split="train[5:3]")
    with pytest.raises(UserError, match=r"split='train\[5\]' must be a name, or a part of a split"):
        sources.open_source("digits", "", split="train[5]")
    with pytest.raises(UserError, match="split='test': the digits"):
        sources.open_source("digits", "", split="test")


def opened(source, path, size, cache_dir):
    """Returns all images of 4 channels in one size."""
    images = sources.open_source(source, str(path), channels=4)
    return cache.open_images(images, image_size=size, channels=4, cache_dir=str(cache_dir))[:]


def test_pictures_have_alpha_as_fourth_channel(tmp_path):
    """From files, zips, Parquet and sources without alpha, whose pictures are opaque."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 4), np.uint8)
    opaque, encoded = Image.fromarray(pictures[2, ..., :3]), []
    (tmp_path / "set").mkdir()
    for i, image in enumerate([*map(Image.fromarray, pictures[:2]), opaque]):
        image.save(tmp_path / "set" / f"{i}.png")
        encoded.append((tmp_path / "set" / f"{i}.png").read_bytes())
    pictures[2, ..., 3] = 255
    parquet.write_table(pyarrow.table({"image": encoded}), tmp_path / "set.parquet")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, content in enumerate(encoded):
            archive.writestr(f"{i}.png", content)
    for name in ("set", "set.zip", "set.parquet"):
        np.testing.assert_array_equal(opened("files", tmp_path / name, 8, tmp_path / "cache"), pictures)
    digits = opened("digits", "", 8, tmp_path / "cache")
    grey = cache.open_images(sources.open_source("digits", ""), image_size=8, channels=1, cache_dir=str(tmp_path))[:]
    np.testing.assert_array_equal(digits[..., :3], np.repeat(grey, 3, axis=-1))
    assert (digits[..., 3] == 255).all()


def test_a_resize_weights_colours_by_alpha(tmp_path):
    """The colour of transparent parts does not show at their edges. As ever, without alpha they are white."""
    red = np.zeros((16, 16, 4), np.uint8)
    red[:, :] = (0, 255, 0, 0)
    red[4:12, 4:12] = (200, 0, 0, 255)
    Image.fromarray(red).save(tmp_path / "red.png")
    (small,) = opened("files", tmp_path, 8, tmp_path / "cache")
    shown = small[small[..., 3] > 20]
    assert len(shown) >= 16 and (small[..., 3] < 255).any()
    np.testing.assert_allclose(shown[:, :3], np.broadcast_to([200, 0, 0], (len(shown), 3)), atol=12)
    assert sources.open_source("files", str(tmp_path))[0][0, 0].tolist() == [255, 255, 255]


def test_pictures_have_no_other_number_of_channels():
    for channels in (2, 5, 1024):
        for source in ("digits", "tfds:mnist", "hf:someone/birds", "files"):
            with pytest.raises(UserError, match=rf"channels={channels} goes with arrays, .*: give 1 \("):
                sources.open_source(source, "", channels=channels)


def test_errors_name_the_key(tmp_path):
    with pytest.raises(UserError, match="path is empty"):
        sources.open_source("files", "")
    with pytest.raises(UserError, match="does not exist"):
        sources.open_source("files", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="source='dogs' must be"):
        sources.open_source("dogs", "")
