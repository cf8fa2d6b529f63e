"""How often independent classifiers see the class that a sample was asked for.

The classifiers learn from real images. Their accuracy on held-out real images is what perfect samples would reach.
The functions are pure and deterministic. They take features [n, d] and labels int [n].
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

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
    result = {}
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


def split_indices(num: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the images to learn from and of a fifth to hold out, sorted; always the same for a `num`.

    Args:
      num: the number of images.
      most: the largest number of either.
    """
    order = np.random.default_rng(0).permutation(num)  # files are often in the order of their classes
    size = num // HELD_OUT
    return np.sort(order[size:][:most]), np.sort(order[:size][:most])


def _labelled(name: str, features: ArrayLike, labels: ArrayLike) -> tuple[Any, Any]:
    """Returns float64 features [n, d] and labels [n], n >= 1, or raises ValueError."""
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(f"need {name} [n, d] and a label for each row, n >= 1, not {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite")
    return x, y
