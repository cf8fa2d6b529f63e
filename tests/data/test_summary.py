import numpy as np
import pytest
from conftest import assert_same

from diffusion_jax.data import digits, summary

DIGITS = np.stack([digits.digits()[i] for i in range(1797)])
COLOUR = np.random.default_rng(0).integers(0, 256, (200, 6, 5, 3), np.uint8)
GREY = COLOUR[..., [0, 0, 0]]


def summarized(images, labels=None):
    return summary.summarize([{"image": images} | ({} if labels is None else {"label": labels})])


def warned(images, counts=()):
    return summary.warnings(summarized(images), dict(counts))


def test_numbers_of_the_images():
    dark = COLOUR // 4 + np.uint8([10, 20, 30])
    found = summarized(np.concatenate([dark, dark[:3]]))
    assert (found.num, found.lowest, found.highest, found.copies) == (203, (10, 20, 30), (73, 83, 93), 3)
    np.testing.assert_allclose(found.means, np.concatenate([dark, dark[:3]]).mean((0, 1, 2)))
    assert not found.nearly_constant and not found.is_grey and found.labels is None


@pytest.mark.parametrize("images", [DIGITS, COLOUR, GREY], ids=["digits", "colour", "grey"])
def test_blocks_give_the_numbers_of_all_at_once(images):
    labels = np.arange(len(images), dtype=np.int32) % 7
    blocks = [{"image": images[i : i + 13], "label": labels[i : i + 13]} for i in range(0, len(images), 13)]
    assert_same(summary.summarize(iter(blocks)), summarized(images, labels))


def test_one_block_in_colour_is_enough():
    assert summary.summarize([{"image": GREY}]).is_grey
    assert not summary.summarize([{"image": GREY}, {"image": COLOUR}]).is_grey
    sums_alike = np.uint8([[[[1, 2, 3], [2, 3, 1], [3, 1, 2]]]])
    assert not summarized(sums_alike).is_grey


def test_sums_of_many_bright_pixels_do_not_overflow():
    assert summarized(np.full((70_000, 16, 16, 1), 255, np.uint8)).means == (255.0,)  # their sum is above 2^32


def test_class_counts_name_the_classes():
    assert summary.class_counts(np.int32([2, 0, 2]), ("cat", "dog", "owl")) == {"cat": 1, "dog": 0, "owl": 2}


# ---------------------------------------------------------------- warnings


def constant(num):
    """Returns the colours of COLOUR, `num` of them with one colour each and the noise of a JPEG."""
    images = COLOUR.copy()
    images[:num] = COLOUR[:num, :1, :1] // 2 + np.arange(6, dtype=np.uint8)[:, None, None]
    return images


FAULTS = {
    "identical": (np.repeat(COLOUR[:1], 200, 0), ["all 200 images are identical: check the files"]),
    "copies": (
        np.concatenate([COLOUR, COLOUR[:50]]),
        ["50 of 250 images (20.0%) are exact copies of others: remove the copies"],
    ),
    "constant": (
        constant(3),
        [
            "3 of 200 images have nearly one colour only (each channel varies by at most 8 levels): remove them, or "
            "check the crop (config.data.crop)"
        ],
    ),
    "in [0, 1]": (
        COLOUR // 128,
        ["no value is above 1, of 255: if the values were in [0, 1], multiply them by 255 in the files"],
    ),
    "narrow": (COLOUR // 9 + 100, ["all values are in 100..128, of 0..255: stretch them in the files"]),
    "grey": (GREY, ["the three channels are equal in every pixel: set --config.data.channels=1"]),
    "few": (COLOUR[:99], ["very few images (99), which the network learns by heart: add images"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_warned_of(name):
    images, expected = FAULTS[name]
    assert warned(images) == expected


def test_channels_of_one_value_are_named_and_those_that_a_range_leaves_narrow():
    pixels = np.concatenate([COLOUR, np.full_like(COLOUR[..., :1], 255)], axis=-1)
    found = summarized(pixels)
    (text,) = summary.warnings(found, {})
    assert text == "channel 3, counted from 0, is 255 in every pixel: leave it out of the files"
    assert summary.warnings(found, {}, has_alpha=True) == ["alpha is 255 in every pixel: set --config.data.channels=3"]
    pixels[0, 0, 0, 3] = 254
    assert warned(pixels) == [] == summary.warnings(summarized(pixels), {}, has_alpha=True)
    (text,) = summary.warnings(summarized(pixels), {}, has_range=True)
    assert text == "channel 3, counted from 0, is in 254..255 of 256 levels: scale it in the file"


def test_narrow_levels_of_a_range_are_mended_by_the_range():
    for images in (COLOUR // 9 + 100, COLOUR // 32):
        (text,) = summary.warnings(summarized(images), {}, has_range=True)
        assert text == f"all values are in {images.min()}..{images.max()} of 256 levels: narrow config.data.range"


def test_classes_with_one_image_or_none_are_named():
    counts = {"cat": 150, "dog": 1, "owl": 0}
    assert warned(COLOUR, counts) == [
        "classes with one image or none: 2 (dog, owl): add images, or remove or merge these classes"
    ]
    (text,) = warned(COLOUR, {f"person {i}": 1 for i in range(200)})
    assert "none: 200 (person 0, person 1, person 2, person 3, person 4, …): add" in text


def test_good_images_are_not_warned_of():
    labels = np.array([digits.digits().label(i) for i in range(1797)])
    assert warned(DIGITS, summary.class_counts(labels, "0123456789")) == []
    assert warned(COLOUR) == warned(COLOUR[:100]) == []


def test_a_few_faults_among_many_images_are_not_warned_of():
    images = np.random.default_rng(1).integers(0, 256, (2001, 2, 2, 1), np.uint8)
    images[0] = 7
    images[1:20] = images[20]
    assert (summarized(images).copies, summarized(images).nearly_constant) == (19, 1)
    assert warned(images) == []


def test_one_image_is_few_and_no_more():
    assert [text.split(":")[0] for text in warned(COLOUR[:1])] == [
        "very few images (1), which the network learns by heart"
    ]


# ---------------------------------------------------------------- which images to draw


@pytest.mark.parametrize("num", [1, 5, 16, 1000])
def test_images_without_classes_are_spread_over_the_data_set(num):
    chosen = summary.spread(num, None, 16)
    assert len(chosen) == len(set(chosen)) == min(num, 16)
    if num == 1000:
        np.testing.assert_array_equal(chosen * 16 // 1000, np.arange(16))
    np.testing.assert_array_equal(chosen, summary.spread(num, None, 16))


def test_images_are_spread_over_the_classes():
    labels = np.repeat(np.arange(3), [2, 5, 900])
    chosen = summary.spread(len(labels), labels, 16)
    assert len(set(chosen)) == 16
    assert np.bincount(labels[chosen]).tolist() == [2, 5, 9]  # the small classes are shown whole
    assert (np.diff(labels[chosen]) >= 0).all()
    ten = np.arange(1797) % 10
    assert sorted(np.bincount(ten[summary.spread(1797, ten, 16)])) == [1] * 4 + [2] * 6


def test_of_more_classes_than_images_each_shows_one():
    labels = np.arange(1000) % 100
    shown = labels[summary.spread(1000, labels, 16)]
    assert len(set(shown)) == 16 and shown[0] == 0 and shown[-1] == 99
    assert len(summary.spread(3, np.array([5, 5, 9]), 16)) == 3


@pytest.mark.parametrize("shape", [(30, 3), (2, 3, 5, 3)])
def test_signals_and_volumes_have_the_numbers_of_images_with_their_values(shape):
    assert_same(summarized(COLOUR.reshape(200, *shape)), summarized(COLOUR))
    assert warned(GREY.reshape(200, *shape)) == warned(GREY) != []
