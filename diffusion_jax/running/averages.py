"""Power-function averages of the parameters, and others computed from them afterwards (Karras et al., 2024, section 3).

The average with exponent γ after t steps weights the parameters of step τ by the profile
p(τ) = (γ + 1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t. Its relative length σ_rel is the standard deviation of p, divided by t.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def exponent(sigma_rel: float) -> float:
    """Returns the γ ≥ 0 of a relative length in (0, 12^−½]: σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)). Appendix C."""
    t = sigma_rel**-2.0
    return float(np.max(np.roots([1, 7, 16 - t, 12 - t]).real))


SIGMA_REL = (0.05, 0.10)  # of the two averages that a run keeps; those of the paper
EXPONENTS = tuple(map(exponent, SIGMA_REL))


def rate(n: jax.Array, gamma: float) -> jax.Array:
    """Returns 1 − β for step n = 1, 2, …, with β = (1 − 1/n)^(γ+1). Section 3.1.

    In float32 β itself would lose percents of 1 − β after many steps.
    """
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / n))


def updated(trees: tuple, params: Any, n: jax.Array, exponents: Sequence[float]) -> tuple:
    """Returns the averages after step n, β · average + (1 − β) · parameters for each exponent.

    The parameters of step k then have the weight ∫ p dτ over k − 1 < τ ≤ k, and those before the first step 0.
    """

    def of(average, gamma):
        share = rate(n.astype(jnp.float32), gamma)
        return jax.tree.map(lambda old, new: old + share * (new - old), average, params)  # exact where new is old

    return tuple(of(average, gamma) for average, gamma in zip(trees, exponents, strict=True))


def inner_product(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> np.ndarray:
    """Returns ∫ p_a p_b dτ of two profiles, float64. Appendix C."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    # (min/max) to the exponent of the longer profile, which is cut at the end of the shorter one.
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def fit(t: np.ndarray, gamma: np.ndarray, t_wanted: float, gamma_wanted: float) -> tuple[np.ndarray, float]:
    """Returns (weights [n], error): the weighted profiles of (t, γ) [n] nearest to the wanted one. Section 3.2.

    The weights minimise ∫ (Σ w p − p_wanted)² dτ with Σ w = 1, so that parameters which never move stay the same.
    (The paper's weights add up to 1 only nearly.) The error is the root of that integral over ∫ p_wanted² dτ.
    """
    n = len(t)
    gram = np.zeros((n + 1, n + 1))  # with the multiplier of Σ w = 1
    gram[:n, :n] = inner_product(t[:, None], gamma[:, None], t, gamma)
    gram[n, :n] = gram[:n, n] = 1
    cross = inner_product(t, gamma, t_wanted, gamma_wanted)
    weights = np.linalg.solve(gram, np.append(cross, 1.0))[:n]
    norm = inner_product(t_wanted, gamma_wanted, t_wanted, gamma_wanted)
    square = weights @ gram[:n, :n] @ weights - 2 * weights @ cross + norm
    return weights, float(np.sqrt(max(square, 0.0) / norm))
