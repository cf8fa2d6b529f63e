import os

import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import parts
from diffusion_jax.data import pixels, sources
from diffusion_jax.data.arrays import arrays
from diffusion_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 10, 6, 4), np.uint8)


def saved(folder, array, name="images.npy", **others):
    """Writes a .npy, or an .npz that is compressed if its name says so; returns its path."""
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, array)
    else:
        (np.savez_compressed if "compressed" in name else np.savez)(path, images=array, **others)
    return path


def all_of(source):
    return np.stack([source[i] for i in range(len(source))])


def config_of(path, **overrides):
    shape = {"data__image_size": (10, 6), "data__channels": 4, "data__cache_dir": str(path.parent / "cache")}
    return tiny_config(**{"data__source": "files", "data__path": str(path)} | shape | overrides)


@pytest.mark.parametrize("name", ["images.npy", "stored.npz", "compressed.npz"])
def test_images_are_those_of_the_array(tmp_path, name):
    source = arrays(saved(tmp_path, IMAGES, name))
    np.testing.assert_array_equal(all_of(source), IMAGES)
    assert source.name(3) == f"{name}[3]" and source.dtype == "uint8" and source.label is None
    source = arrays(saved(tmp_path, IMAGES[..., 0], name))
    np.testing.assert_array_equal(all_of(source), IMAGES[..., :1])


def test_a_change_of_the_file_or_of_the_range_has_another_cache(tmp_path):
    path = saved(tmp_path, IMAGES)
    before = arrays(path).version
    assert arrays(path).version == before != arrays(path, (0, 255)).version
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert arrays(path).version != before


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int16, ">u2", np.uint8])
def test_a_range_becomes_minus_one_to_one(tmp_path, dtype):
    values = np.linspace(0, 200, IMAGES.size).reshape(IMAGES.shape).astype(dtype)
    source = arrays(saved(tmp_path, values), (-40, 200))
    image = source[5]
    assert image.dtype == np.float32 and source.dtype == "float32"
    np.testing.assert_allclose(image, (values[5].astype(float) + 40) / 120 - 1, atol=1e-6)


def test_values_outside_of_the_range_are_unreadable_images(tmp_path):
    values = np.zeros((3, 4, 4), np.float32)
    values[1, 2, 2], values[2, 0, 0] = 1.5, np.nan
    source = arrays(saved(tmp_path, values), (-1, 1))
    assert source[0].shape == (4, 4, 1)
    with pytest.raises(ValueError, match=r"values from 0 to 1\.5 are outside config\.data\.range=\(-1, 1\)"):
        source[1]
    with pytest.raises(ValueError, match=r"^1 of 16 values are NaN, which config\.data\.range cannot map$"):
        source[2]


def test_the_extent_of_an_array_without_a_range_is_that_of_its_finite_values(tmp_path):
    values = np.linspace(-2, 5, 48, dtype=np.float32).reshape(3, 4, 4)
    values[0], values[1, 0, 0] = np.nan, np.inf
    with pytest.raises(
        UserError, match=r"float32 \[3, 4, 4\] from 0\.53\d+ to 5: give the numbers .*range='\(0, 4095\)'"
    ):
        arrays(saved(tmp_path, values))


def test_labels_are_classes(tmp_path):
    numbers = np.arange(12) % 3
    source = arrays(saved(tmp_path, IMAGES, "a.npz", labels=numbers))
    assert [source.label(i) for i in range(12)] == numbers.tolist() and source.classes == ["0", "1", "2"]
    names = np.array(["cat", "ant", "bee"])[numbers]
    source = arrays(saved(tmp_path, IMAGES, "b.npz", labels=names))
    assert [source.classes[source.label(i)] for i in range(12)] == names.tolist()


@pytest.mark.parametrize("cache_limit_gb", [64.0, 0.0])
def test_arrays_of_a_config(tmp_path, cache_limit_gb):
    """Cached or on the fly, resized or not, in part, uint8 and float32."""
    path = saved(tmp_path, IMAGES, "images.npz", labels=np.arange(12) % 3)
    images = parts.images(config_of(path, data__cache_limit_gb=cache_limit_gb))
    np.testing.assert_array_equal(images[:], IMAGES)
    assert images.classes == ("0", "1", "2")
    some = parts.images(config_of(path, data__cache_limit_gb=cache_limit_gb, data__split="train[3:5]"))
    np.testing.assert_array_equal(some.examples(np.arange(2))["image"], IMAGES[3:5])
    half = parts.images(config_of(path, data__cache_limit_gb=cache_limit_gb, data__image_size=(5, 3)))
    assert half.shape == (12, 5, 3, 4) and abs(half[:].mean() - IMAGES.mean()) < 2
    scaled = parts.images(config_of(path, data__cache_limit_gb=cache_limit_gb, data__range=(0, 255)))[:]
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, IMAGES / 127.5 - 1, atol=1e-6)


def test_channels_do_not_mix_in_a_resize(tmp_path):
    """Pillow would weight the first three of four channels by the last."""
    images = np.zeros((1, 8, 8, 4), np.uint8)
    images[..., 0] = 200
    resized = parts.images(config_of(saved(tmp_path, images), data__image_size=4))[:]
    np.testing.assert_array_equal(resized, images[:, ::2, ::2])


BAD = {
    "floats": (np.ones((3, 4, 4), np.float32), None, r"holds float32 \[3, 4, 4\] from 1 to 1: give the numbers that"),
    "a vector": (np.ones(5, np.uint8), None, r"holds uint8 \[5\], not images: give numbers \[N, H, W, C\]"),
    "no images": (np.ones((0, 4, 4), np.uint8), None, r"holds uint8 \[0, 4, 4\], not images"),
    "complex": (np.ones((2, 4, 4), complex), (0, 1), r"holds complex128 .* not images"),
    "booleans": (np.ones((2, 4, 4), bool), (0, 1), r"holds bool .* not images"),
    "channels first": (np.ones((2, 3, 8, 8), np.uint8), None, r"looks like \[N, C, H, W\]: give array\.transpose"),
    "Fortran": (np.asfortranarray(np.ones((2, 8, 8), np.uint8)), None, r"in Fortran's order\): write it again"),
    "a list of images": (np.array([[0, 1], [2]], object), None, r"holds Python objects\): write it again"),
    "text": (np.array([[["a"]]]), (0, 1), r"holds <U1 \[1, 1, 1\], not images: give numbers"),
    "times": (np.zeros((1, 2, 2), "M8[s]"), (0, 1), r"holds datetime64\[s\] .* not images"),
    "a record": (np.zeros((2, 4, 4), [("r", "u1"), ("g", "u1")]), None, r"holds .* \[2, 4, 4\], not images"),
    "a number": (np.uint8(3), None, r"holds uint8 \[\], not images"),
    "one image": (np.ones((8, 8), np.uint8), None, r"holds uint8 \[8, 8\], not images"),
    "images without a width": (np.ones((3, 4, 0, 1), np.uint8), None, r"holds uint8 \[3, 4, 0, 1\], not images"),
    "integers without a range": (np.full((2, 4, 4), 999, np.uint16), None, r"uint16 .* from 999 to 999: give the"),
    "nothing but NaN": (np.full((2, 4, 4), np.nan), None, r"float64 \[2, 4, 4\]: give the"),
    "objects": (np.array([[[None]]]), None, r"holds Python objects\): write it again"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_array_of_images_is_refused(tmp_path, name):
    array, bounds, message = BAD[name]
    with pytest.raises(UserError, match=message):
        arrays(saved(tmp_path, array), bounds)


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.arange(5), r"labels int64 \[5\] for 12 images: give a number >= 0 or a name for each"),
        (np.arange(12) - 1, r"labels int64 \[12\] for 12 images"),
        (np.linspace(0, 1, 12), r"labels float64 \[12\] for 12 images"),
        (np.zeros((12, 1), int), r"labels int64 \[12, 1\] for 12 images"),
        (np.zeros(12, bool), r"labels bool \[12\] for 12 images"),
        (np.int64(3), r"labels int64 \[\] for 12 images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        arrays(saved(tmp_path, IMAGES, "a.npz", labels=labels))


def test_damaged_files_are_refused(tmp_path):
    path = saved(tmp_path, IMAGES)
    content = path.read_bytes()
    for name, some, message in (
        ("images.npy", content[:-1], r"images\.npy cannot be read \(it is shorter than its header says\): write it"),
        ("images.npy", content[:40], r"images\.npy cannot be read \("),
        ("images.npy", b"", r"images\.npy cannot be read \("),
        ("images.npz", content, r"images\.npz cannot be read \("),
    ):
        (tmp_path / name).write_bytes(some)
        with pytest.raises(UserError, match=message):
            arrays(tmp_path / name)
    np.savez(tmp_path / "objects.npz", images=IMAGES, labels=np.array([None] * 12))
    with pytest.raises(UserError, match=r"objects\.npz cannot be read \(Object arrays cannot be loaded"):
        arrays(tmp_path / "objects.npz")
    np.savez(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match=r"it has nothing, but neither images nor arr_0\): write it again"):
        arrays(tmp_path / "nothing.npz")
    saved(tmp_path, IMAGES, "compressed.npz")
    whole = (tmp_path / "compressed.npz").read_bytes()
    (tmp_path / "compressed.npz").write_bytes(whole[:300] + bytes(200) + whole[500:])
    with pytest.raises(UserError, match=r"compressed\.npz cannot be read \("):
        arrays(tmp_path / "compressed.npz")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(UserError, match=r"folder\.npy cannot be read \(.*directory"):
        arrays(tmp_path / "folder.npy")
    np.savez(tmp_path / "other.npz", pictures=IMAGES)
    with pytest.raises(UserError, match=r"it has pictures, but neither images nor arr_0"):
        arrays(tmp_path / "other.npz")


def test_what_does_not_go_with_an_array_is_refused(tmp_path):
    path = saved(tmp_path, IMAGES)
    with pytest.raises(UserError, match=r"config\.data\.split='test': an array has only 'train'"):
        sources.open_source("files", str(path), split="test")
    with pytest.raises(UserError, match=r"config\.data\.range=\(0, 1\) goes with arrays, \.npy or \.npz: leave it out"):
        sources.open_source("digits", "", bounds=(0, 1))


@pytest.mark.parametrize(
    "own, channels, bounds, fits",
    [
        *((4, 4, None, True), (1, 3, None, True), (3, 1, None, True), (5, 5, (0, 255), True)),
        *((4, 3, None, False), (3, 4, None, False), (1, 2, None, False), (1, 3, (0, 255), False)),
    ],
)
def test_channels_agree(tmp_path, own, channels, bounds, fits):
    """Grey and RGB go with each other in uint8, as pictures do. No alpha is made up."""
    path = saved(tmp_path, IMAGES[..., [0]] if own == 1 else np.concatenate([IMAGES, IMAGES], -1)[..., :own])
    config = config_of(path, data__channels=channels, data__range=bounds or ())
    if fits:
        assert parts.images(config).shape == (12, 10, 6, channels)
    else:
        message = rf"images\.npy holds uint8 .*, {own} channels, but config\.data\.channels={channels}: give {own}$"
        with pytest.raises(UserError, match=message):
            parts.images(config)


def test_many_channels_may_be_a_volume(tmp_path):
    config = config_of(saved(tmp_path, np.zeros((4, 10, 6, 8), np.uint8)), data__channels=1)
    with pytest.raises(UserError, match=r"channels=1: give 8, or \(D, H, W\) as config\.data\.image_size for volumes$"):
        parts.images(config)


@pytest.mark.parametrize("limit", [64.0, 0.0])
@pytest.mark.parametrize("kind", ["uint8", ">u2", "int8", "float16", "float64"])
def test_the_type_of_the_numbers_is_kept(tmp_path, limit, kind):
    path = saved(tmp_path, (IMAGES // 4).astype(kind))
    images = parts.images(config_of(path, data__range=(0, 64), data__cache_limit_gb=limit))
    expected = {"uint8": "uint8", ">u2": "uint16", "int8": "int8"}.get(kind, "float32")
    assert images.array_dtype == expected
    if expected != "float32":
        np.testing.assert_array_equal(pixels.to_range(images[:], 0, 64, expected), IMAGES // 4)
    assert parts.images(tiny_config(data__cache_dir=str(tmp_path))).array_dtype == ""


# ---------------------------------------------------------------- signals and volumes


@pytest.mark.parametrize("name", ["a.npy", "stored.npz", "compressed.npz"])
@pytest.mark.parametrize("size", [(16,), (4, 2, 6)])
def test_signals_and_volumes_are_those_of_the_array(tmp_path, name, size):
    values = np.random.default_rng(0).integers(0, 256, (5, *size, 2), np.uint8)
    np.testing.assert_array_equal(all_of(arrays(saved(tmp_path, values, name), size=size)), values)
    np.testing.assert_array_equal(all_of(arrays(saved(tmp_path, values[..., 0], name), size=size)), values[..., :1])
    scaled = all_of(arrays(saved(tmp_path, values * 0.5, name), (0, 127.5), size=size))
    np.testing.assert_allclose(scaled, values / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("cache_limit_gb", [64.0, 0.0])
@pytest.mark.parametrize("size", [(16,), (4, 2, 6)])
def test_signals_and_volumes_of_a_config(tmp_path, size, cache_limit_gb):
    """Cached or on the fly they are those of the file, in part too; labels are their classes."""
    values = np.random.default_rng(0).integers(0, 256, (12, *size, 3), np.uint8)
    path = saved(tmp_path, values, "a.npz", labels=np.arange(12) % 3)
    shape = {"data__image_size": size, "data__channels": 3, "data__cache_limit_gb": cache_limit_gb}
    images = parts.images(config_of(path, **shape))
    assert images.shape == values.shape and images.classes == ("0", "1", "2")
    np.testing.assert_array_equal(images[:], values)
    some = parts.images(config_of(path, data__split="train[3:5]", **shape)).examples(np.arange(2))
    np.testing.assert_array_equal(some["image"], values[3:5])
    assert some["label"].tolist() == [0, 1]


UNFIT = {
    "images as signals": ((3, 4, 4, 1), (4,), r"not signals: give numbers \[N, L, C\] or \[N, L\]$"),
    "images as volumes": ((3, 4, 4), (4, 4, 4), r"not volumes: give numbers \[N, D, H, W, C\] or \[N, D, H, W\]$"),
    "signals as images": ((3, 4), None, r"not images: .*, or \(L,\) as config\.data\.image_size for signals"),
    "volumes as images": ((3, 4, 4, 4, 1), None, r"not images: .*\(D, H, W\) for volumes \[N, D, H, W, C\]$"),
    "another length": (
        (3, 60),
        (64,),
        r"holds the size \(60,\), not config\.data\.image_size=\(64,\): give that of the",
    ),
    "another depth": ((3, 2, 4, 4), (4, 4, 4), r"holds the size \(2, 4, 4\), not config\.data\.image_size=\(4, 4, 4\)"),
    "channels first": ((3, 1, 64), (64,), r"holds the size \(1,\), not config\.data\.image_size=\(64,\)"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_arrays_of_another_size_than_the_config_are_refused(tmp_path, name):
    shape, size, message = UNFIT[name]
    with pytest.raises(UserError, match=message):
        arrays(saved(tmp_path, np.zeros(shape, np.uint8)), size=size)


def test_signals_and_volumes_come_from_arrays_alone(tmp_path):
    for source, path in (("digits", ""), ("tfds:mnist", ""), ("files", str(tmp_path)), ("hf:a/b", "")):
        with pytest.raises(
            UserError, match=r"config\.data\.image_size=\(8,\) makes signals or volumes, which come from ar"
        ):
            sources.open_source(source, path, size=(8,))
    grey = saved(tmp_path, np.zeros((3, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"3 channels, but config\.data\.channels=1: give 3$"):  # no conversion to grey
        parts.images(config_of(grey, data__image_size=(8,), data__channels=1))
