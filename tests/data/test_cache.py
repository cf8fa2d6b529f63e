import dataclasses
import json
import os
import resource
import shutil
import sys
import time
import types

import numpy as np
import pytest
from conftest import assert_same
from PIL import Image

from diffusion_jax.data import cache, pipeline
from diffusion_jax.data.source import Source
from diffusion_jax.errors import UserError

PICTURES = np.random.default_rng(0).integers(0, 256, (150, 12, 10, 3), np.uint8)


def source(pictures=PICTURES, damaged=(), label=lambda i: i % 7, version="1"):
    """Returns a source of arrays, some of which cannot be read."""

    def read(i):
        if i in damaged:
            raise OSError("image file is truncated")
        return pictures[i]

    return Source("/some/where/set.zip", version, len(pictures), "{}.png".format, read, label, ())


@pytest.fixture
def images(tmp_path):
    def open_images(source, **options):
        options = {"image_size": 10, "channels": 3, "cache_dir": str(tmp_path / "cache")} | options
        return cache.open_images(source, **options)

    return open_images


def test_centre_crop_keeps_the_pixels(images):
    np.testing.assert_array_equal(images(source())[:], PICTURES[:, 1:11])  # the centre 10×10, untouched


def test_crop_comes_before_the_resize(images):
    expected = [Image.fromarray(picture[4:8, 3:7]).resize((2, 2), Image.Resampling.BICUBIC) for picture in PICTURES]
    np.testing.assert_array_equal(images(source(), image_size=2, crop=4)[:], np.stack(expected))


def test_the_crop_has_the_shape_of_the_result(images):
    """The pictures are 12×10: a crop of 4 rows and 8 columns, the largest of 1:2, and the largest of 3:1."""

    def resized(picture, size):
        return Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)

    for size, crop, rows, columns in (
        ((2, 4), 4, slice(4, 8), slice(1, 9)),
        ((2, 4), 0, slice(3, 8), slice(0, 10)),
        ((6, 2), 0, slice(0, 12), slice(3, 7)),
    ):
        expected = np.stack([resized(picture[rows, columns], size) for picture in PICTURES])
        np.testing.assert_array_equal(images(source(), image_size=size, crop=crop)[:], expected)
        np.testing.assert_array_equal(images(source(), image_size=size, crop=crop, cache_limit=0)[:], expected)
    with pytest.raises(UserError, match=r"10x12 is smaller than the crop of 12x6 \(config\.data\.crop=6\)"):
        images(source(), image_size=(2, 4), crop=6)


def test_channels_are_converted(images):
    grey = [np.asarray(Image.fromarray(picture).convert("L"))[1:11, :, None] for picture in PICTURES]
    np.testing.assert_array_equal(images(source(), channels=1)[:], np.stack(grey))
    np.testing.assert_array_equal(images(source(PICTURES[..., :1], version="2"))[:], PICTURES[:, 1:11, :, [0, 0, 0]])


# ---------------------------------------------------------------- the cache


def caches(tmp_path):
    return sorted((tmp_path / "cache").iterdir())


def test_images_are_decoded_once(images, tmp_path, monkeypatch):
    first = images(source())
    monkeypatch.setattr(cache, "_fit", None)
    second = images(source())
    np.testing.assert_array_equal(first[:], second[:])
    np.testing.assert_array_equal(second.labels, np.arange(150) % 7)
    (folder,) = caches(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {
        "source": "/some/where/set.zip",
        "crop": 0,
        "image_size": 10,
        "channels": 3,
        "count": 150,
        "skipped": [],
    }
    assert expected.items() <= manifest.items()
    assert len(manifest["names_sha256"]) == 64
    np.testing.assert_array_equal(np.load(folder / "images.npy"), first[:])  # a file that NumPy reads


def test_images_are_indexed_like_an_array(images):
    cached, array = images(source()), PICTURES[:, 1:11]
    for index in (0, -1, slice(140, None), np.array([3, 3, 149]), np.array([[5], [2]])):
        np.testing.assert_array_equal(cached[index], array[index])
    with pytest.raises(IndexError):
        cached[150]


def test_other_files_or_settings_have_another_cache(images, tmp_path):
    images(source())
    other = PICTURES[::-1]
    np.testing.assert_array_equal(images(source(other, version="2"))[:], other[:, 1:11])
    assert images(source(), image_size=5).shape == (150, 5, 5, 3)
    assert images(source(), crop=9).shape == (150, 10, 10, 3)
    assert len(caches(tmp_path)) == 4


def damage(name):
    def cut(folder):
        with (folder / name).open("r+b") as file:
            file.truncate((folder / name).stat().st_size - 1)

    return cut


@pytest.mark.parametrize(
    "spoil",
    [
        damage("images.npy"),
        damage("labels.npy"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"count": 150', '"count": 149')
        ),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"version": "1"', '"version": "0"')
        ),
    ],
)
def test_damaged_cache_is_rebuilt(images, tmp_path, capsys, spoil):
    images(source())
    spoil(caches(tmp_path)[0])
    np.testing.assert_array_equal(images(source())[:], PICTURES[:, 1:11])
    assert "is damaged" in capsys.readouterr().out
    assert len(caches(tmp_path)) == 1
    images(source())
    assert "is damaged" not in capsys.readouterr().out


def alter(folder):
    """Changes one byte of the images."""
    with (folder / "images.npy").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 255]))


def test_altered_pixels_are_found(images, tmp_path, capsys):
    images(source())
    alter(caches(tmp_path)[0])
    np.testing.assert_array_equal(images(source())[:], PICTURES[:, 1:11])
    assert "is damaged (the checksum of images.npy differs): rebuilding it" in capsys.readouterr().out


def test_checksum_is_computed_once_for_a_copy_and_always_for_another_user(images, tmp_path, monkeypatch):
    images(source())
    computed, crc32 = [], cache._crc32
    monkeypatch.setattr(cache, "_crc32", lambda file: computed.append(file.name) or crc32(file))
    images(source())
    assert computed == []
    os.utime(caches(tmp_path)[0] / "images.npy")  # as a copy has
    images(source())
    images(source())
    assert computed == ["images.npy"]
    monkeypatch.setattr(cache.os, "getuid", lambda: -1)
    images(source())
    images(source())
    assert computed == ["images.npy", *2 * ["images.npy", "labels.npy"]]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Makes tmp_path/cache the bucket gs://cache."""
    monkeypatch.setattr(cache, "_LOCAL", str(tmp_path / "local"))
    real = cache.epath.Path
    monkeypatch.setattr(cache.epath, "Path", lambda path: real(tmp_path / str(path).removeprefix("gs://")))
    return "gs://cache"


def test_bucket_stores_a_copy(images, bucket, tmp_path, monkeypatch, capsys):
    images(source(), cache_dir=bucket)
    shutil.rmtree(tmp_path / "local")
    monkeypatch.setattr(cache, "_fit", None)  # decodes nothing
    np.testing.assert_array_equal(images(source(), cache_dir=bucket)[:], PICTURES[:, 1:11])
    assert [path.name for path in (tmp_path / "local").iterdir()] == [path.name for path in caches(tmp_path)]
    assert "damaged" not in capsys.readouterr().out


def test_altered_copy_in_a_bucket_is_replaced(images, bucket, tmp_path, capsys):
    images(source(), cache_dir=bucket)
    alter(caches(tmp_path)[0])
    shutil.rmtree(tmp_path / "local")
    np.testing.assert_array_equal(images(source(), cache_dir=bucket)[:], PICTURES[:, 1:11])
    assert "the checksum of images.npy differs" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(caches(tmp_path)[0] / "images.npy"), PICTURES[:, 1:11])


def test_cache_dir_expands_the_home(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images(source(), cache_dir="~/cache")
    assert len(caches(tmp_path)) == 1


def test_files_are_on_disk_before_the_rename(images, tmp_path, monkeypatch):
    synced, sync = [], cache._sync
    monkeypatch.setattr(cache, "_sync", lambda path: synced.append(path.name) or sync(path))
    images(source())
    (folder,) = caches(tmp_path)
    assert sorted(synced[:3]) == ["images.npy", "labels.npy", "manifest.json"]
    assert synced[3:] == [folder.name, "cache"]


def test_cache_stays_readable_when_it_is_removed(images, tmp_path):
    cached = images(source())
    shutil.rmtree(caches(tmp_path)[0])
    np.testing.assert_array_equal(cached[:], PICTURES[:, 1:11])


def test_images_with_more_frames_are_counted(images, tmp_path, capsys):
    images(dataclasses.replace(source(), several=lambda: 3))
    assert "3 of 150 images have several frames or pages: the first is taken\n" in capsys.readouterr().out
    assert json.loads((caches(tmp_path)[0] / "manifest.json").read_text())["first_of_several"] == 3


def test_interrupted_decoding_leaves_no_cache(images, tmp_path):
    with pytest.raises(UserError):
        images(source(damaged=[140]))
    assert caches(tmp_path) == []


def test_old_leftovers_of_killed_processes_are_removed(images, tmp_path):
    images(source())
    name = caches(tmp_path)[0].name
    other = "another-8x8x3-0123456789abcdef"
    old = [f"{name}.00000001.partial", f"{other}.00000002.partial", f"{other}.00000003.stale"]
    kept = [f"{name}.00000004.partial", "my.partial"]  # a process may still write to the first
    for leftover in (*old, *kept):
        folder = tmp_path / "cache" / leftover
        folder.mkdir()
        (folder / "images.npy").write_bytes(b"some")
        for path in (folder / "images.npy", folder):
            os.utime(path, (time.time() - (0 if leftover == kept[0] else 7200),) * 2)
    (tmp_path / "cache" / f"{name}.00000005.partial").mkdir()  # another process has just made it
    images(source(version="2"))
    left = {folder.name for folder in caches(tmp_path)}
    assert not left & set(old) and {name, *kept, f"{name}.00000005.partial"} < left


def test_cache_of_another_process_is_used(images, monkeypatch):
    """Two processes make the same cache at once: the slower one takes that of the faster one."""
    write, made = cache._write_images, []

    def slow_write(*args):
        result = write(*args)
        if not made:
            made.append(True)
            made.append(images(source())[:])
        return result

    monkeypatch.setattr(cache, "_write_images", slow_write)
    np.testing.assert_array_equal(images(source())[:], made[1])


def test_damaged_images_are_named_and_skipped_only_on_request(images, capsys, tmp_path):
    with pytest.raises(UserError, match=r"140\.png: image file is truncated.*skip_corrupt=True"):
        images(source(damaged=[140]))
    readable = images(source(damaged=[2, 140]), skip_corrupt=True)
    kept = np.delete(np.arange(150), [2, 140])
    np.testing.assert_array_equal(readable[:], PICTURES[kept, 1:11])
    np.testing.assert_array_equal(readable.labels, kept % 7)
    printed = capsys.readouterr().out
    assert "skipped 2 of 150 images that cannot be read; the first is 2.png: image file is truncated" in printed
    assert len(json.loads((caches(tmp_path)[0] / "manifest.json").read_text())["skipped"]) == 2
    with pytest.raises(UserError, match=r"no image of /some/where/set\.zip can be read"):
        images(source(damaged=range(150), version="2"), skip_corrupt=True)


def test_image_smaller_than_the_crop_is_refused(images):
    with pytest.raises(UserError, match=r"0\.png: 10x12 is smaller than the crop of 11"):
        images(source(), crop=11)


def test_unwritable_folder_and_full_disk_are_refused(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir: .*cannot be written"):
        images(source(), cache_dir=str(tmp_path / "file"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"free, but the cache takes .*cache_limit_gb"):
        images(source())


# ---------------------------------------------------------------- on the fly


def test_images_on_the_fly_equal_those_of_the_cache(images, tmp_path, capsys):
    cached, decoded = images(source()), images(source(), cache_limit=1000)
    assert "is decoded on the fly: the cache would take 0.0 GB" in capsys.readouterr().out
    assert len(caches(tmp_path)) == 1
    assert decoded.shape == cached.shape
    for index in (3, slice(5), np.array([149, 0])):
        np.testing.assert_array_equal(decoded[index], cached[index])
    options = {"seed": 0, "batch_size": 8}
    ahead = pipeline.iterate(pipeline.batches(decoded, **options), 7, decoded.num_threads)
    for step in range(7, 40):
        assert_same(next(ahead), pipeline.batches(cached, **options)[step])


def test_damaged_images_on_the_fly_raise_or_are_replaced(images):
    with pytest.raises(UserError, match=r"2\.png: image file is truncated"):
        images(source(damaged=[2]), cache_limit=0)[np.array([1, 2])]
    readable = images(source(damaged=[2, 3]), cache_limit=0, skip_corrupt=True)
    np.testing.assert_array_equal(readable[np.array([1, 2])], PICTURES[[1, 4], 1:11])
    assert_same(readable.examples(np.array([1, 2])), {"image": PICTURES[[1, 4], 1:11], "label": np.int32([1, 4])})
    assert images(source(label=None, version="2"), cache_limit=0).examples(np.array([0])).keys() == {"image"}
    broken = images(source(damaged=range(150)), cache_limit=0)
    ahead = pipeline.iterate(pipeline.batches(broken, seed=0, batch_size=8), 0)
    with pytest.raises(UserError, match="truncated"):
        next(ahead)


def test_memory_stays_flat(images):
    """Three epochs of a data set of 60 MB do not enlarge the process."""
    large = np.random.default_rng(0).integers(0, 256, (5000, 64, 64, 3), np.uint8)
    cached = images(source(large), image_size=64)
    del large
    ahead = pipeline.iterate(pipeline.batches(cached, seed=0, batch_size=50), 0)
    for _ in range(30):
        next(ahead)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for _ in range(300):
        next(ahead)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 20e6
