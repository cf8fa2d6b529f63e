import gzip
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.errors import UserError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 12, 10, 3), np.uint8)


def read(path, tmp_path, **options):
    options = {"image_size": 10, "channels": 3} | options
    return data.open_images("files", str(path), cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def folder(tmp_path):
    """Five PNGs of 10×12, in two folders, beside things that are no images."""
    for i, picture in enumerate(PICTURES):
        file = tmp_path / "set" / ("b" if i > 2 else "a") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    (tmp_path / "set" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "a" / "._0.png").write_text("what macOS leaves behind")
    return tmp_path / "set"


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder.parent))
    return path


def save_idx(path, images, compress):
    raw = struct.pack(">4B3i", 0, 0, 8, 3, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


# ---------------------------------------------------------------- sources


def test_digits():
    digits = data.open_images("digits", "", image_size=8, channels=1)
    assert digits.shape == (1797, 8, 8, 1)
    assert digits.dtype == np.uint8
    assert sorted(np.unique(digits)) == [round(i * 255 / 16) for i in range(17)]


def test_folder_in_the_order_of_names(folder, tmp_path):
    np.testing.assert_array_equal(read(folder, tmp_path), PICTURES[:, 1:11])  # the centre 10×10, untouched


def test_zip_is_the_folder(folder, tmp_path):
    archive = zipped(folder, tmp_path / "set.zip")
    np.testing.assert_array_equal(read(archive, tmp_path), read(folder, tmp_path))


@pytest.mark.parametrize("compress", [True, False])
def test_idx(tmp_path, compress):
    images = RNG.integers(0, 256, (7, 6, 6), np.uint8)
    (tmp_path / "mnist").mkdir()
    file = tmp_path / "mnist" / f"train-images-idx3-ubyte{'.gz' * compress}"
    save_idx(file, images, compress)
    for path in (file, file.parent):
        np.testing.assert_array_equal(read(path, tmp_path, image_size=6, channels=1)[..., 0], images)


def test_crop_then_resize(folder, tmp_path):
    images = read(folder, tmp_path, image_size=2, crop=4)
    expected = [Image.fromarray(picture[4:8, 3:7]).resize((2, 2), Image.Resampling.BICUBIC) for picture in PICTURES]
    np.testing.assert_array_equal(images, np.stack(expected))


def test_grey(folder, tmp_path):
    expected = [np.asarray(Image.fromarray(picture).convert("L"))[1:11, :, None] for picture in PICTURES]
    np.testing.assert_array_equal(read(folder, tmp_path, channels=1), np.stack(expected))


def test_modes_and_orientation(tmp_path):
    """Alpha is laid on white, a palette is resolved, 16 bits become 8, EXIF turns the picture."""
    folder = tmp_path / "modes"
    folder.mkdir()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "0_transparent.png")
    Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "1_palette.png")
    Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16)).save(folder / "2_deep.png")
    turned = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 2, axis=0).repeat(2, axis=0).repeat(2, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(folder / "3_turned.png", exif=exif)
    images = read(folder, tmp_path, image_size=4)
    assert images[0].min() == 255
    np.testing.assert_array_equal(images[1], np.full((4, 4, 3), [10, 200, 30]))
    assert set(images[2].ravel()) == {127}
    np.testing.assert_array_equal(images[3, :, :, 0], np.repeat(np.uint8([0, 0, 255, 255]), 4).reshape(4, 4))


# ---------------------------------------------------------------- the cache


def test_decoded_once(folder, tmp_path, monkeypatch):
    first = read(folder, tmp_path)
    monkeypatch.setattr(data, "_fit", None)
    np.testing.assert_array_equal(read(folder, tmp_path), first)
    assert isinstance(first, np.memmap)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"]


def test_changed_files_or_settings_are_decoded_again(folder, tmp_path):
    read(folder, tmp_path)
    Image.fromarray(PICTURES[4]).save(folder / "a" / "0.png", compress_level=0)
    np.testing.assert_array_equal(read(folder, tmp_path)[0], PICTURES[4, 1:11])
    assert read(folder, tmp_path, image_size=5).shape == (5, 5, 5, 3)


def test_a_stopped_decoding_leaves_no_cache(folder, tmp_path):
    (folder / "b" / "9.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(UserError):
        read(folder, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- what cannot be used


def test_a_corrupt_image_is_named_and_skipped_only_on_request(folder, tmp_path, capsys):
    whole = (folder / "b" / "3.png").read_bytes()
    (folder / "b" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b/3\.png.*skip_corrupt=True"):
        read(folder, tmp_path)
    images = read(folder, tmp_path, skip_corrupt=True)
    np.testing.assert_array_equal(images, PICTURES[[0, 1, 2, 4], 1:11])
    assert "left out 1 of 5 images" in capsys.readouterr().out


def test_a_zip_with_a_flipped_byte_names_the_image(folder, tmp_path):
    archive = zipped(folder, tmp_path / "set.zip")
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"IDAT") + 20] ^= 1
    archive.write_bytes(raw)
    with pytest.raises(UserError, match=r"set/b/4\.png"):
        read(archive, tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path):
    (tmp_path / "bombs").mkdir()
    Image.new("1", (8000, 8000)).save(tmp_path / "bombs" / "small.png")
    with pytest.raises(UserError, match=r"small\.png.*8000x8000"):
        read(tmp_path / "bombs", tmp_path)


def test_an_image_smaller_than_the_crop(folder, tmp_path):
    with pytest.raises(UserError, match=r"a/0\.png.*10x12 is smaller than the crop of 11"):
        read(folder, tmp_path, crop=11)


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no archive")
    save_idx(tmp_path / "labels-idx1-ubyte", np.zeros((1, 1, 1), np.uint8), False)
    (tmp_path / "labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x01\x00")
    (tmp_path / "cut-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100))[:20])
    for path, message in (
        ("", "path is empty"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "text.txt", "no folder, zip or idx"),
        (tmp_path / "labels-idx1-ubyte", "not an idx file of uint8 images"),
        (tmp_path / "cut-idx3-ubyte.gz", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read(path, tmp_path)
    with pytest.raises(UserError, match="source='dogs'"):
        data.open_images("dogs", "", image_size=8, channels=1)


# ---------------------------------------------------------------- batches

NUMBERED = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 1), np.uint8)
NUMBERED[:, :, 1] += 100  # the left column holds the number, the right one 100 more


def batches(**options):
    return data.batches(NUMBERED, **{"seed": 0, "batch_size": 8, "flip": True} | options)


def test_each_epoch_holds_every_image_once_in_its_own_order():
    dataset = batches(batch_size=4, flip=False)
    epochs = [
        [int(x) for step in range(5 * epoch, 5 * epoch + 5) for x in dataset[step][:, 0, 0, 0]] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(20))


def test_the_seed_decides():
    assert not np.array_equal(batches(seed=1)[0], batches()[0])
    np.testing.assert_array_equal(batches()[3], batches()[3])


def test_flips_are_a_coin_per_example():
    flipped = np.concatenate([batches()[step][:, 0, 0, 0] >= 100 for step in range(100)])
    assert 0.45 < flipped.mean() < 0.55
    per_image = {}
    for step in range(50):
        for left in batches()[step][:, 0, 0, 0].tolist():
            per_image.setdefault(left % 100, set()).add(left >= 100)
    assert all(sides == {True, False} for sides in per_image.values())  # not decided once and for all
    assert not any((batches(flip=False)[step][:, 0, 0, 0] >= 100).any() for step in range(20))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_processes(processes):
    for step in (0, 3, 1000):
        shares = [batches(process_index=p, process_count=processes)[step] for p in range(processes)]
        np.testing.assert_array_equal(np.stack(shares, axis=1).reshape(8, 1, 2, 1), batches()[step])


def test_iterate_starts_anywhere():
    iterator = data.iterate(batches(), 1001)
    for step in range(1001, 1010):
        np.testing.assert_array_equal(next(iterator), batches()[step])
