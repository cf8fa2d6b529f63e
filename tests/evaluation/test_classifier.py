import math

import numpy as np
import pytest
from conftest import Examples

from diffusion_jax.evaluation import classifier, metrics, quality


def clusters(labels, d=6, seed=0):
    """Returns rows around a corner of the cube for each label, far from those of the other labels."""
    return 3 * np.eye(d)[labels] + 0.3 * np.random.default_rng(seed).standard_normal((len(labels), d))


TRAIN, HELD_OUT, ASKED = np.arange(90) % 3, np.arange(40) % 3, np.arange(50) % 3


def measured(samples, asked=ASKED, held_out_labels=HELD_OUT, scale=1.0):
    train, held_out = clusters(TRAIN, seed=1), clusters(HELD_OUT, seed=2)
    return classifier.accuracies(scale * train, TRAIN, scale * held_out, held_out_labels, scale * samples, asked)


def test_accuracy_is_the_share_of_samples_of_the_class_that_was_asked():
    drawn = ASKED.copy()
    drawn[:10] = (drawn[:10] + 1) % 3  # ten samples show another class
    wrong = HELD_OUT.copy()
    wrong[:4] = (wrong[:4] + 1) % 3
    result = measured(clusters(drawn), held_out_labels=wrong)
    assert set(result) == {"logistic_regression", "nearest_neighbours"}
    for values in result.values():
        assert values["accuracy"] == 0.8 and values["standard_error"] == pytest.approx(math.sqrt(0.8 * 0.2 / 50))
        assert values["held_out_accuracy"] == 0.9
        assert values["held_out_standard_error"] == pytest.approx(math.sqrt(0.9 * 0.1 / 40))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_accuracy_does_not_depend_on_the_unit_of_the_features(scale):
    samples = np.random.default_rng(3).standard_normal((50, 6)) + clusters(ASKED)
    expected = measured(samples)
    assert 0.5 < expected["logistic_regression"]["accuracy"] < 1
    assert measured(samples, scale=scale) == expected == measured(samples)


def test_a_class_that_the_classifier_never_saw_is_never_seen():
    assert measured(clusters(ASKED), asked=np.full(50, 5))["logistic_regression"]["accuracy"] == 0


def test_a_fifth_is_held_out_whatever_the_order():
    train, held_out = classifier.split_indices(1797)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1797))
    assert len(held_out) == 359
    for labels in (np.arange(1797) % 10, np.arange(1797) // 180):  # in turn, and one class after the other
        assert np.bincount(labels[held_out], minlength=10).min() > 20
    everything, none = classifier.split_indices(1797, hold_out=False)
    assert len(everything) == 1797 and not len(none)
    assert len(classifier.split_indices(60_000)[0]) == len(classifier.split_indices(60_000)[1]) == classifier.MANY


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples": np.zeros((0, 6)), "asked": np.zeros(0, int)}, "samples"),
        ({"samples": np.full((50, 6), np.nan)}, "samples must be finite"),
        ({"asked": ASKED[:3]}, "a label for each row"),
        ({"train_labels": np.zeros(90, int)}, "class"),
    ],
)
def test_unusable_sets(change, message):
    sets = {
        **{"train": clusters(TRAIN), "train_labels": TRAIN, "held_out": clusters(HELD_OUT)},
        **{"held_out_labels": HELD_OUT, "samples": clusters(ASKED), "asked": ASKED},
    }
    with pytest.raises(ValueError, match=message):
        classifier.accuracies(**(sets | change))


class Real(Examples):
    classes = ("a", "b")


def images_of(labels, seed=0):
    """Returns uint8 [n, 2, 2, 1], dark for class 0 and bright for class 1."""
    noise = np.random.default_rng(seed).integers(0, 60, (len(labels), 2, 2, 1))
    return (noise + 150 * np.asarray(labels)[:, None, None, None]).astype(np.uint8)


def real(num, seed=1):
    labels = np.arange(num) % 2
    return Real(images_of(labels, seed), labels)


def compare(asked, datasets, drawn=None):
    drawn = np.minimum(asked, 1) if drawn is None else drawn
    return classifier.compare_classes(images_of(drawn), asked, datasets, quality.pixels)


def test_samples_are_compared_with_the_real_images_of_their_class():
    asked = np.arange(40) % 2
    values, settings = compare(asked, {"train": real(100)}, drawn=np.where(np.arange(40) < 4, 1 - asked, asked))
    assert values["classifiers"]["logistic_regression"]["accuracy"] == 0.9
    assert values["classifiers"]["nearest_neighbours"]["held_out_accuracy"] == 1
    y, labels = quality.pixels(real(100).arrays["image"]), real(100).arrays["label"]
    drawn = quality.pixels(images_of(np.where(np.arange(40) < 4, 1 - asked, asked)))
    expected = metrics.frechet_within_classes(drawn, asked, y, labels)
    assert values["frechet_within_classes"] == pytest.approx(expected, rel=1e-5)
    plain = compare(asked, {"train": real(100)})[0]["frechet_within_classes"]
    assert plain[0] < expected[0] / 2  # without the four samples of the other class
    about = settings["classifiers"]
    assert (about["n"], about["fit"], about["held_out"]) == (40, 80, 20)
    assert about["held_out_split"] == "a fifth of train, which is not fit"
    assert settings["frechet_within_classes"] == {"classes": 2}


def test_a_second_split_is_held_out():
    _, settings = compare(np.arange(40) % 2, {"train": real(100), "test": real(30, 2)})
    about = settings["classifiers"]
    assert (about["fit"], about["held_out"], about["held_out_split"]) == (100, 30, "test")


def test_samples_of_no_class_are_left_out():
    asked = np.arange(60) % 3
    values, settings = compare(asked, {"train": real(100)})
    assert settings["classifiers"]["n"] == 40 and values["classifiers"]["logistic_regression"]["accuracy"] == 1
    values, settings = compare(np.full(9, 2), {"train": real(100)})
    assert values == {"classifiers": None, "frechet_within_classes": None}
    assert settings["classifiers"] == {"left_out": "no sample was asked for a class"}


def test_what_cannot_be_measured_says_why():
    few = compare(np.arange(8) % 2, {"train": real(100)})
    assert few[0]["frechet_within_classes"] is None and few[0]["classifiers"] is not None
    assert few[1]["frechet_within_classes"]["left_out"] == "class 0 has 4 samples, no more than its 4 features"
    little = compare(np.arange(40) % 2, {"train": real(6)})
    assert "class 0 has 3 rows in a set" in little[1]["frechet_within_classes"]["left_out"]
    one = compare(np.zeros(40, int), {"train": Real(images_of(np.zeros(50, int)), np.zeros(50, int))})
    assert one[0]["classifiers"] is None and "class" in one[1]["classifiers"]["left_out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "MAX_FEATURES", 3)
        assert (
            "more than the 3" in compare(np.arange(40) % 2, {"train": real(9)})[1]["frechet_within_classes"]["left_out"]
        )
