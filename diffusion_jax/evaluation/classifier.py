"""How often independent classifiers see the class that a sample was asked for.

The classifiers learn from real images. Their accuracy on held-out real images is what perfect samples would reach.
All numbers are deterministic.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from diffusion_jax.errors import one_line
from diffusion_jax.evaluation import metrics, quality

MANY = 10_000  # largest number of real images to learn from, and to test on
NEIGHBOURS = 5
HELD_OUT = 5  # one image in so many is held out if there is no split for it


def accuracies(
    train: ArrayLike,
    train_labels: ArrayLike,
    held_out: ArrayLike,
    held_out_labels: ArrayLike,
    samples: ArrayLike,
    asked: ArrayLike,
) -> dict[str, dict[str, float]]:
    """Returns the accuracy of logistic regression and of k nearest neighbours on samples and on held-out images.

    Features are shifted to mean 0 and divided by one deviation, so that their unit does not matter.

    Args:
      train: [n, d], features of the real images that the classifiers learn from.
      train_labels: int [n], of at least 2 classes.
      held_out: [m, d], features of real images that they do not learn from.
      held_out_labels: int [m].
      samples: [k, d].
      asked: int [k], the class that each sample was asked for.

    Returns:
      {"logistic_regression": {"accuracy": on the samples, "standard_error", "held_out_accuracy",
      "held_out_standard_error"}, "nearest_neighbours": the same}; the errors are √(p (1 − p) / number of images).

    Raises:
      ValueError: a set is empty, a value is not finite, the shapes do not match, or there are fewer than 2 classes.
    """
    x, y = _labelled("train", train, train_labels)
    sets = {"": _labelled("samples", samples, asked), "held_out_": _labelled("held_out", held_out, held_out_labels)}
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = math.sqrt(np.mean(deviation**2)) or 1.0
    result: dict[str, dict[str, float]] = {}
    models = {
        "logistic_regression": LogisticRegression(max_iter=1000),
        "nearest_neighbours": KNeighborsClassifier(min(NEIGHBOURS, len(x))),
    }
    for name, model in models.items():
        model.fit((x - mean) / scale, y)
        result[name] = {}
        for prefix, (rows, labels) in sets.items():
            p = float(np.mean(model.predict((rows - mean) / scale) == labels))
            error = math.sqrt(p * (1 - p) / len(rows))
            result[name] |= {f"{prefix}accuracy": p, f"{prefix}standard_error": error}
    return result


def compare_classes(
    generated: np.ndarray, asked: np.ndarray, datasets: dict[str, Any], features: quality.Features
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compares samples with the real images of the class that each was asked for.

    Args:
      generated: uint8 [n, H, W, C].
      asked: int [n], their classes; samples of no class, the number of classes, are left out.
      datasets: {split: images with labels}. The classifiers learn from the first and are tested on the second, or else
        on a fifth of the first that they do not learn from.
      features: the feature extractor.

    Returns:
      ({"classifiers": see `accuracies`, "frechet_within_classes": [mean over the classes, standard error]}, the
      settings of both). A value that cannot be computed is None, and its settings say why.
    """
    (split, real), *others = datasets.items()
    known = asked < len(real.classes)
    if not known.any():
        why = {"left_out": "no sample was asked for a class"}
        return _both(None, None), _both(why, why)
    x, asked = quality.extract(generated[known], features), asked[known]
    fit, held_out = split_indices(len(real), hold_out=not others)
    test_split, test = others[0] if others else (f"a fifth of {split}, which is not fit", real)
    held_out = split_indices(len(test), hold_out=False)[0] if others else held_out
    settings = {"n": len(x), "fit": len(fit), "held_out": len(held_out), "held_out_split": test_split}
    settings |= {"logistic_regression": {"C": 1.0}, "nearest_neighbours": {"k": NEIGHBOURS}}
    try:
        (train, train_labels), (other, other_labels) = (
            _features(data, rows, features) for data, rows in ((real, fit), (test, held_out))
        )
        accuracy, of_accuracy = accuracies(train, train_labels, other, other_labels, x, asked), settings
    except ValueError as error:
        accuracy, of_accuracy = None, settings | {"left_out": one_line(error)}
    distance, of_distance = _within_classes(x, asked, real, features)
    return _both(accuracy, distance), _both(of_accuracy, of_distance)


def _both(of_classifiers, of_distance):
    return {"classifiers": of_classifiers, "frechet_within_classes": of_distance}


def _within_classes(x, asked, real, features):
    """Returns ([mean, standard error] or None, settings); reads the real images only if there are enough samples."""
    classes, counts = np.unique(asked, return_counts=True)
    if x.shape[1] > quality.MAX_FEATURES:
        return None, {"left_out": f"{x.shape[1]} features are more than the {quality.MAX_FEATURES} of a covariance"}
    if counts.min() <= x.shape[1]:
        few = f"class {classes[counts.argmin()]} has {counts.min()} samples, no more than its {x.shape[1]} features"
        return None, {"left_out": few}
    try:
        y, labels = _features(real, np.arange(len(real)), features)
        return list(metrics.frechet_within_classes(x, asked, y, labels)), {"classes": len(classes)}
    except ValueError as error:
        return None, {"left_out": one_line(error)}


def _features(dataset, indices, features):
    """Returns the features [n, d] and the labels [n] of the images at `indices`; keeps few images in memory."""
    x, labels = [], []
    for block in np.array_split(indices, max(1, -(-len(indices) // 1024))):
        batch = dataset.examples(block)
        x.append(quality.extract(batch["image"], features))
        labels.append(batch["label"])
    return np.concatenate(x), np.concatenate(labels)


def split_indices(num: int, hold_out: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of images to learn from, and of a fifth to test on, up to MANY of each.

    They are always the same for a `num`, and sorted.

    Args:
      num: the number of images.
      hold_out: False holds none out.
    """
    order = np.random.default_rng(0).permutation(num)  # files are often in the order of their classes
    size = num // HELD_OUT if hold_out else 0
    return np.sort(order[size:][:MANY]), np.sort(order[:size][:MANY])


def _labelled(name: str, features: ArrayLike, labels: ArrayLike) -> tuple[Any, Any]:
    """Returns float64 features [n, d] and labels [n], n >= 1, or raises ValueError."""
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(f"need {name} [n, d] and a label for each row, n >= 1, not {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite")
    return x, y
