import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import folders, sources
from diffusion_jax.errors import UserError

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), np.uint8)


def read(path, **options):
    source = sources.open_source("files", str(path), **options)
    return [source[i] for i in range(len(source))]


def labels(source):
    return [source.label(i) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """Writes five PNGs of 10×12 in two folders, beside files that are not images."""
    for i, picture in enumerate(PICTURES):
        file = tmp_path / "set" / ("b" if i > 2 else "a") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    (tmp_path / "set" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "a" / "._0.png").write_text("a file that macOS leaves behind")
    return tmp_path / "set"


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder.parent))
    return path


def test_images_are_sorted_by_name(folder):
    np.testing.assert_array_equal(read(folder), PICTURES)


def test_zip_equals_the_folder(folder, tmp_path):
    archive = sources.open_source("files", str(zipped(folder, tmp_path / "set.zip")))
    np.testing.assert_array_equal([archive[i] for i in range(5)], PICTURES)
    assert archive.name(3) == "set/b/3.png"
    assert labels(archive) == [0, 0, 0, 1, 1] and archive.classes == ["a", "b"]


def test_single_folder_has_no_classes(folder):
    assert sources.open_source("files", str(folder / "a")).label is None


def test_split_is_the_folder_of_that_name(folder, tmp_path):
    for split, names in (("train", "ab"), ("test", "b")):
        for name in names:
            (tmp_path / "all" / split / name).mkdir(parents=True)
            Image.fromarray(PICTURES[0]).save(tmp_path / "all" / split / name / "0.png")
    for path in (tmp_path / "all", zipped(tmp_path / "all", tmp_path / "all.zip")):
        assert len(read(path)) == 2
        assert len(read(path, split="test")) == 1
        with pytest.raises(UserError, match=r"config\.data\.split='val'"):
            read(path, split="val")


def test_errors_name_the_key(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no archive")
    for name, message in (("empty", "holds no images"), ("text.txt", "must be a folder, a zip or an idx file")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


# ---------------------------------------------------------------- pixels


def test_pixels_of_modes_and_orientations(tmp_path):
    """Lays alpha on white, applies the palette and the EXIF orientation, and reduces 16 bits to 8."""
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "0_transparent.png")
    Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(
        tmp_path / "1_palette.png"
    )
    Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16)).save(tmp_path / "2_deep.png")
    wide = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 2, axis=0).repeat(2, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it a quarter clockwise
    wide.save(tmp_path / "3_turned.png", exif=exif)
    Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "4_print.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "5_one_bit.png")
    images = read(tmp_path)
    np.testing.assert_array_equal(images[0], np.full((4, 4, 3), 255))
    np.testing.assert_array_equal(images[1], np.full((4, 4, 3), [10, 200, 30]))
    np.testing.assert_array_equal(images[2], np.full((4, 4, 1), 127))
    np.testing.assert_array_equal(images[3][..., 0], np.repeat(np.uint8([[0, 0], [255, 255]]), 2, axis=0))
    assert images[4].shape == (4, 4, 3) and images[4].max() < 10
    np.testing.assert_array_equal(images[5], np.full((4, 4, 1), 255))


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bombs").mkdir()
    Image.new("1", (8000, 8000)).save(tmp_path / "bombs" / "small.png")
    with pytest.raises(ValueError, match="8000x8000 is more than the limit of 50000000 pixels"):
        read(tmp_path / "bombs")
    archive = zipped(tmp_path / "bombs", tmp_path / "bombs.zip")
    monkeypatch.setattr(folders, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes unpacked are more than the limit of 100"):
        read(archive)
