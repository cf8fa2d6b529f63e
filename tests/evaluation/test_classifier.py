import math

import numpy as np
import pytest

from diffusion_jax.evaluation import classifier


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
    train, held_out = classifier.split_indices(1797, 10_000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1797))
    assert len(held_out) == 359
    for labels in (np.arange(1797) % 10, np.arange(1797) // 180):  # in turn, and one class after the other
        assert np.bincount(labels[held_out], minlength=10).min() > 20
    again, _ = classifier.split_indices(1797, 100)
    assert len(again) == 100 and set(again) < set(train)


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
