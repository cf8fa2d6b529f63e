"""Noise schedules and the standard deviations of the reverse step.

Su (2022) writes amplitudes, Ho et al. (2020) their squares:

    code        Su        Ho et al.          meaning
    alpha       α_t       sqrt(α_t)          how much of x_{t-1} stays in x_t
    beta        β_t       sqrt(β_t)          how much noise step t adds; α² + β² = 1
    alpha_bar   ᾱ_t       sqrt(ᾱ_t)          α_1 ⋯ α_t
    beta_bar    β̄_t       sqrt(1 − ᾱ_t)      sqrt(1 − ᾱ_t²)

Every array has T + 1 entries and is indexed by the t of the formulas: entry 0
is clean data (alpha_bar = 1, beta_bar = 0), steps are t = 1..T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Schedule(NamedTuple):
    """A noise schedule: four float32 arrays [T + 1], a JAX pytree."""

    alpha: jax.Array
    beta: jax.Array
    alpha_bar: jax.Array
    beta_bar: jax.Array

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return self.alpha.shape[0] - 1


def from_beta_squared(beta_squared) -> Schedule:
    """The schedule with the given β_t², t = 1..T.

    Computed in float64 and rounded once: a float32 product of a thousand factors
    is wrong by 1.7e-4 of β̄_1, although α² + β² = 1 still holds.

    Args:
      beta_squared: [T] numbers in [0, 1); Ho et al.'s β_t.

    Raises:
      ValueError: not a vector of at least one number, or a number outside [0, 1).
    """
    beta_squared = np.asarray(beta_squared, np.float64)
    if beta_squared.ndim != 1 or beta_squared.size == 0:
        raise ValueError(f"beta_squared must be a vector of T >= 1 numbers, not {beta_squared.shape}")
    if not np.all((beta_squared >= 0) & (beta_squared < 1)):
        raise ValueError(f"beta_squared must lie in [0, 1), not {beta_squared}")
    beta_squared = np.concatenate([[0.0], beta_squared])
    alpha_bar_squared = np.cumprod(1 - beta_squared)
    squares = (1 - beta_squared, beta_squared, alpha_bar_squared, 1 - alpha_bar_squared)
    return Schedule(*(jnp.asarray(np.sqrt(square), jnp.float32) for square in squares))


def su_linear(num_steps: int = 1000, scale: float = 0.02) -> Schedule:
    """Su (2022), (18): α_t = sqrt(1 − scale · t / T).

    β_T² = scale whatever T is, so short chains leave signal in x_T: ᾱ_T is 0.0065
    at T = 1000 and 0.60 at T = 100. `Schedule.alpha_bar[-1]` tells.
    """
    return from_beta_squared(scale * np.arange(1, num_steps + 1) / num_steps)


def ho_linear(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """Ho et al. (2020), section 4: β_t² linear from `start` to `end`, both included."""
    return from_beta_squared(np.linspace(start, end, num_steps))


def cosine(num_steps: int) -> Schedule:
    """Nichol & Dhariwal (2021), (17): ᾱ_t² ∝ cos²((t/T + 0.008)/1.008 · π/2), β_t² <= 0.999."""
    f = np.cos((np.linspace(0, 1, num_steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return from_beta_squared(np.minimum(1 - f[1:] / f[:-1], 0.999))


def sigma_zero(s: Schedule) -> jax.Array:
    """σ_t = 0, Su (2022), (16): the greedy chain. float32 [T + 1].

    It returns E[x_0 | x_T]; with a good network that is close to the mean of the data.
    """
    return jnp.zeros_like(s.beta)


def sigma_beta(s: Schedule) -> jax.Array:
    """σ_t = β_t: Su (2022), (17); "fixed large" in Ho et al.'s code. float32 [T + 1]."""
    return s.beta


def sigma_posterior(s: Schedule) -> jax.Array:
    """σ_t = β_t β̄_{t−1} / β̄_t, the deviation of q(x_{t−1} | x_t, x_0). float32 [T + 1].

    Ho et al. (2020), (7): "fixed small" in their code. Entry 0, which no step uses, is 0.
    """
    return jnp.zeros_like(s.beta).at[1:].set(s.beta[1:] * s.beta_bar[:-1] / s.beta_bar[1:])
