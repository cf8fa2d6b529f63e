import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import cache, folders, sources
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


# ---------------------------------------------------------------- what is taken


def write(root, *names):
    """Writes an image under each name; its red is its number."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name, "PNG")
    return root


def names(path, **options):
    source = sources.open_source("files", str(path), **options)
    return [source.name(i) for i in range(len(source))]


HIDDEN = [
    "cat/.ipynb_checkpoints/0-checkpoint.png",
    "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/cat/._0.png",
    ".git/x.png",
    ".thumbnails/0.png",
]


def test_hidden_and_helper_folders_are_left_out(tmp_path, capsys):
    write(tmp_path / "set", "cat/0.png", "dog/1.png", "dog/b.png/2.png", *HIDDEN)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").rglob("*")):
            archive.write(file, str(file.relative_to(tmp_path / "set")).replace("/", "\\"))
    for path in (tmp_path / "set", tmp_path / "set.zip"):
        assert names(path) == ["cat/0.png", "dog/1.png", "dog/b.png/2.png"]
        line = capsys.readouterr().out
        assert line.startswith(f"{path}: 3 images in 3 classes from cat, dog, dog/b.png; left out: 5 hidden\n")


def test_links_are_followed_but_not_around(tmp_path, capsys):
    write(tmp_path / "elsewhere", "cats/0.png", "dogs/1.png")
    root = write(tmp_path / "set", "own/2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "dogs" / "back").symlink_to(root)
    (root / "own" / "up").symlink_to("..")
    (root / "own" / "itself.png").symlink_to("itself.png")
    (root / "own" / "file.png").symlink_to(tmp_path / "elsewhere" / "cats" / "0.png")
    taken = ["linked/cats/0.png", "linked/dogs/1.png", "own/2.png", "own/file.png", "own/itself.png"]
    assert names(root) == taken
    assert "left out: 2 links to a folder above" in capsys.readouterr().out


def test_broken_links_are_damaged_images(tmp_path):
    root = write(tmp_path / "set", "0.png")
    (root / "1.png").symlink_to("missing.png")
    options = {"image_size": 4, "channels": 3, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"image 1\.png: .*No such file.*skip_corrupt=True"):
        cache.open_images(sources.open_source("files", str(root)), **options)
    assert len(cache.open_images(sources.open_source("files", str(root)), skip_corrupt=True, **options)) == 1


def test_pipes_and_unread_suffixes_are_counted(tmp_path, capsys):
    root = write(tmp_path / "set", "0.png", "1.jfif", "2.HEIC", "3.heic", "inner.zip", "readme")
    os.mkfifo(root / "pipe.png")
    assert names(root) == ["0.png", "1.jfif"]
    start, _, left_out = capsys.readouterr().out.strip().partition("; left out: ")
    assert start == f"{root}: 2 images unlabelled"
    assert set(left_out.split(", ")) == {"2 .heic", "1 .zip", "1 pipes or devices", "1 without a suffix"}
    with pytest.raises(UserError, match=r"pipe\.png' must be a folder, a zip or an idx file"):
        names(root / "pipe.png")
    for name in ("0.png", "1.jfif"):
        (root / name).unlink()
    with pytest.raises(UserError, match=r"holds no images \(only .*2 \.heic"):
        names(root)


def test_names_that_are_not_utf8(tmp_path, capsys):
    write(tmp_path / "set", os.fsdecode(b"a\xff/\xfe.png"), "b/line\nend.png")
    source = sources.open_source("files", str(tmp_path / "set"))
    assert (source.name(0), source.name(1)) == ("a\\udcff/\\udcfe.png", "b/line\\nend.png")
    assert source.classes == ["a\\udcff", "b"]
    options = {"image_size": 4, "channels": 3, "cache_dir": str(tmp_path / "cache")}
    np.testing.assert_array_equal(cache.open_images(source, **options)[:][:, 0, 0, 0], [0, 1])
    capsys.readouterr().out.encode()  # can be printed


@pytest.mark.parametrize(
    "folders_, split, taken",
    [
        (["Train", "Val", "Test"], "train", ["Train"]),
        (["Train", "Val", "Test"], "test", ["Test"]),
        (["Train", "Val", "Test"], "validation", ["Val"]),
        (["train", "valid", "testing", "masks"], "train", ["train"]),
        (["train2017", "val2017", "test_2017"], "train", ["train2017"]),
        (["train2017", "val2017"], "val2017", ["val2017"]),
        (["trainA", "trainB", "testA", "testB"], "test", ["testA", "testB"]),
        (["Training Set", "Validation Set"], "val", ["Validation Set"]),
        (["train"], "train", ["train"]),
        (["car/train", "car/test", "bus/train", "bus/test"], "train", ["bus/train", "car/train"]),
        (["set/train/train", "set/train/car", "set/test/car"], "train", ["set/train/car", "set/train/train"]),
        (["train", "car", "bus"], "train", ["bus", "car", "train"]),
        (["train", "train_station", "restrained"], "train", ["restrained", "train", "train_station"]),
        (["train", "."], "train", ["train"]),
        (["faces", "part2"], "part2", ["part2"]),
    ],
)
def test_split_folders_are_told_from_classes(tmp_path, capsys, folders_, split, taken):
    root = write(tmp_path / "set", *(f"{folder}/0.png" for folder in folders_))
    assert [name.removesuffix("/0.png") for name in names(root, split=split)] == taken
    outside = len(folders_) - len(taken)
    assert (f" {outside} outside " in capsys.readouterr().out) == (outside > 0)


@pytest.mark.parametrize(
    "folders_, split",
    [(["val", "test"], "train"), (["train", "car", "bus"], "test"), (["test", "car", "bus"], "test"), (["a"], "val")],
)
def test_missing_split_is_refused(tmp_path, folders_, split):
    root = write(tmp_path / "set", *(f"{folder}/0.png" for folder in folders_))
    with pytest.raises(UserError, match=rf"split='{split}': .*no images in a folder of that name"):
        names(root, split=split)


# ---------------------------------------------------------------- zips that lie


def peak_memory(function):
    """Returns the most bytes that Python and NumPy hold at once during function()."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_zip_unpacks_no_more_than_it_says(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(50_000_000))
    archive = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(archive.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000)))

    def refused():
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            read(tmp_path / "set.zip")

    assert peak_memory(refused) < 5e6
    (tmp_path / "set.zip").write_bytes(archive)
    monkeypatch.setattr(folders, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="50000000 bytes unpacked are more than the limit of 100"):
        read(tmp_path / "set.zip")


def test_compression_without_a_limit_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("0.png", bytes(1000))
    with pytest.raises(ValueError, match="compression 12 is not read from a zip"):
        read(tmp_path / "set.zip")
