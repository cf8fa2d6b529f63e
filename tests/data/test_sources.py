import gzip
import struct
import zipfile

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from diffusion_jax.data import sources
from diffusion_jax.errors import UserError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 12, 10, 3), np.uint8)


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


def save_idx(path, array, compress=False):
    raw = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if compress else raw)


# ---------------------------------------------------------------- kinds of sources


def test_digits():
    digits = sources.open_source("digits", "")
    assert len(digits) == 1797
    assert digits[0].shape == (8, 8, 1) and digits[0].dtype == np.uint8
    values = set(np.unique([digits[i] for i in range(100)]))
    assert values == {round(i * 255 / 16) for i in range(17)}
    assert labels(digits)[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_folder_is_sorted_by_name(folder):
    np.testing.assert_array_equal(read(folder), PICTURES)


def test_zip_equals_the_folder(folder, tmp_path):
    archive = sources.open_source("files", str(zipped(folder, tmp_path / "set.zip")))
    np.testing.assert_array_equal([archive[i] for i in range(5)], PICTURES)
    assert archive.name(3) == "set/b/3.png"
    assert labels(archive) == [0, 0, 0, 1, 1] and archive.classes == ["a", "b"]


def test_the_source_may_be_the_path_itself(folder):
    assert len(sources.open_source(str(folder), "")) == 5


def test_path_takes_precedence_over_the_source(folder):
    for source in ("digits", "tfds:celeb_a", "files"):
        assert len(sources.open_source(source, str(folder))) == 5


def test_a_single_folder_has_no_classes(folder):
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


@pytest.mark.parametrize("compress", [True, False])
def test_idx(tmp_path, compress):
    images = RNG.integers(0, 256, (7, 6, 5), np.uint8)
    end = ".gz" * compress
    save_idx(tmp_path / "mnist" / f"train-images-idx3-ubyte{end}", images, compress)
    save_idx(tmp_path / "mnist" / f"train-labels-idx1-ubyte{end}", np.arange(7, dtype=np.uint8), compress)
    save_idx(tmp_path / "mnist" / f"t10k-images-idx3-ubyte{end}", images[:2], compress)
    for path in (tmp_path / "mnist", tmp_path / "mnist" / f"train-images-idx3-ubyte{end}"):
        source = sources.open_source("files", str(path))
        np.testing.assert_array_equal([source[i][..., 0] for i in range(7)], images)
        assert labels(source) == list(range(7))
    test = sources.open_source("files", str(tmp_path / "mnist"), split="test")
    assert len(test) == 2 and test.label is None


# ---------------------------------------------------------------- TFDS


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


def test_tfds_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)  # no TensorFlow
    with pytest.raises(UserError, match=r"not prepared in .*requirements-prepare\.txt.*folder or a zip") as error:
        sources.tfds("celeb_a", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a TFDS data set") as error:
        sources.tfds("no_such_set", data_dir=str(tmp_path))
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="has no images, only text, label"):
        sources.tfds("imdb_reviews", data_dir=str(tmp_path))


def test_tfds_prepares_with_tensorflow(tmp_path, monkeypatch):
    """Records the call of TFDS, and raises the error that TFDS raises without a network."""
    calls = []

    def download_and_prepare(_, *, download_config, file_format):
        calls.append((download_config.manual_dir, file_format))
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    with pytest.raises(UserError, match=r"cannot be prepared \(ConnectionError: no network and more lines\).*zip"):
        sources.tfds("mnist", data_dir=str(tmp_path), manual_dir=str(tmp_path / "own"))
    assert [(str(folder), kind) for folder, kind in calls] == [(str(tmp_path / "own"), "array_record")]


# ---------------------------------------------------------------- pictures


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


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bombs").mkdir()
    Image.new("1", (8000, 8000)).save(tmp_path / "bombs" / "small.png")
    with pytest.raises(ValueError, match="8000x8000 is more than the limit of 50000000 pixels"):
        read(tmp_path / "bombs")
    archive = zipped(tmp_path / "bombs", tmp_path / "bombs.zip")
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes unpacked are more than the limit of 100"):
        read(archive)


# ---------------------------------------------------------------- errors and parts of a split


def test_errors_name_the_key(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no archive")
    save_idx(tmp_path / "labels-idx1-ubyte", np.zeros(1, np.uint8))
    (tmp_path / "cut-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100))[:20])
    save_idx(tmp_path / "odd" / "train-images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    save_idx(tmp_path / "odd" / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    for path, message in (
        ("", "path is empty"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "text.txt", "must be a folder, a zip or an idx file"),
        (tmp_path / "labels-idx1-ubyte", "not an idx file of uint8 images"),
        (tmp_path / "cut-idx3-ubyte.gz", "cannot be read"),
        (tmp_path / "odd", "3 labels for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match="source='dogs' must be"):
        sources.open_source("dogs", "")


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
