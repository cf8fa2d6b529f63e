"""How often two standard errors of the Fréchet distance contain its mean over new sets.

    python -m tools.frechet_coverage

For each case it draws pairs of sets, and prints the mean and the standard deviation of their distances, the root mean
square of `metrics.frechet_standard_error`, and the share of pairs whose distance is within 1.96 of their own
standard errors of the mean.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_jax.evaluation import metrics
from diffusion_jax.running.tables import markdown_table


class Case(NamedTuple):
    """Two sets of n and m rows of d features: draw, and shift + scale · draw."""

    name: str
    draw: Callable  # (rng, n, d) -> rows
    n: int
    m: int
    d: int
    shift: float = 0.2
    scale: float = 1.2


def _normal(rng, n, d):
    return rng.standard_normal((n, d))


def _sparse(rng, n, d):
    """Like features of Inception: above 0, mostly small, and of another scale for each row."""
    return np.maximum(rng.standard_normal((n, d)) - 0.5, 0) * np.exp(0.5 * rng.standard_normal((n, 1)))


CASES = (
    Case("normal", _normal, 200, 200, 8),
    Case("normal, equal distributions", _normal, 200, 400, 64, 0.0, 1.0),
    Case("normal", _normal, 1000, 1000, 64),
    Case("normal, fewer rows than features", _normal, 40, 400, 64),
    Case("sparse", _sparse, 300, 300, 64),
    Case("sparse, fewer rows than features", _sparse, 50, 1000, 64),
    Case("Student, 5 degrees", lambda rng, n, d: rng.standard_t(5, (n, d)), 300, 300, 16),
    Case("log-normal", lambda rng, n, d: np.exp(_normal(rng, n, d)), 300, 300, 16),
    Case("log-normal", lambda rng, n, d: np.exp(_normal(rng, n, d)), 1000, 1000, 16),
)


def simulate(case: Case, repeats: int) -> tuple[float, float, float, float]:
    """Returns (mean and standard deviation of the distances, root mean square of the errors, coverage)."""
    rng = np.random.default_rng(0)
    distances, errors = np.zeros(repeats), np.zeros(repeats)
    for i in range(repeats):
        x = case.draw(rng, case.n, case.d)
        y = case.shift + case.scale * case.draw(rng, case.m, case.d)
        distances[i], errors[i] = metrics.frechet_of_features(x, y), metrics.frechet_standard_error(x, y)
    coverage = np.mean(np.abs(distances - distances.mean()) < 1.96 * errors)
    return distances.mean(), distances.std(ddof=1), np.sqrt(np.mean(errors**2)), float(coverage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    rows = [
        [case.name, case.n, case.m, case.d, *(f"{x:.4g}" for x in values[:3]), f"{values[3]:.1%}"]
        for case in CASES
        for values in [simulate(case, repeats)]
    ]
    head = ("rows", "n", "m", "d", "mean distance", "deviation", "standard error", "coverage")
    print("\n".join(markdown_table(head, rows)))


if __name__ == "__main__":
    main()
