"""Noise schedules and the standard deviations of the reverse step.

Su (2022) writes amplitudes, Ho et al. (2020) write their squares:

    code        Su        Ho et al.          meaning
    alpha       α_t       sqrt(α_t)          amplitude of x_{t-1} in x_t
    beta        β_t       sqrt(β_t)          amplitude of the noise of step t: α² + β² = 1
    alpha_bar   ᾱ_t       sqrt(ᾱ_t)          amplitude of x_0 in x_t: α_1 ⋯ α_t
    beta_bar    β̄_t       sqrt(1 − ᾱ_t)      amplitude of the noise of steps 1..t: sqrt(1 − ᾱ_t²)

Every array has T + 1 entries and is indexed by the t of the formulas. Steps are t = 1..T;
entry 0 is clean data (alpha_bar = 1, beta_bar = 0).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MOST_STEPS = 2**24  # of a schedule: the network embeds t as a float32


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


def checked(name: str, values: Any, low: int, high: int, ndim: int = 0) -> Any:
    """Returns `values` as an integer in low..high, or as a vector of such integers if ndim is 1.

    Raises ValueError, named by `name`, for anything else. Of traced numbers only the type and the shape are known.
    """
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    array = jnp.asarray(values) if is_traced else np.asarray(values)
    holds = array.ndim == ndim and jnp.issubdtype(array.dtype, jnp.integer)
    if not holds or (not is_traced and array.size and not (low <= array.min() and array.max() <= high)):
        shown = np.array2string(array, threshold=10) if isinstance(array, np.ndarray) else repr(values)
        raise ValueError(f"{name}={shown} must be {'a vector of integers' if ndim else 'an integer'} in {low}..{high}")
    return array if is_traced else array[()]


def from_beta_squared(beta_squared: ArrayLike | Sequence[float]) -> Schedule:
    """Returns the schedule with the squared amplitudes β_t², t = 1..T.

    The arrays are computed in float64 and rounded to float32 once. Products in float32 would give β̄_1²
    a relative error of 1.7e-4, although α² + β² = 1 would still hold.

    Args:
      beta_squared: [T] numbers in [0, 1), Ho et al.'s β_t.

    Raises:
      ValueError: `beta_squared` is not a vector of at least one number, or a number lies outside [0, 1).
    """
    beta_squared = np.asarray(beta_squared, np.float64)
    if beta_squared.ndim != 1 or beta_squared.size == 0:
        raise ValueError(f"beta_squared has shape {beta_squared.shape}: it must be a vector of T >= 1 numbers")
    outside = beta_squared[~((beta_squared >= 0) & (beta_squared < 1))]
    if outside.size > 0:
        raise ValueError(f"beta_squared holds {outside[0]}: its numbers must lie in [0, 1)")
    beta_squared = np.concatenate([[0.0], beta_squared])
    alpha_bar_squared = np.cumprod(1 - beta_squared)
    squares = (1 - beta_squared, beta_squared, alpha_bar_squared, 1 - alpha_bar_squared)
    with jax.ensure_compile_time_eval():  # numbers, not tracers, inside a jit too: a grid of steps needs them
        return Schedule(*(jnp.asarray(np.sqrt(square), jnp.float32) for square in squares))


def _from_alpha_bar_squared(alpha_bar_squared):
    """Returns the schedule with the squared amplitudes ᾱ_t², float64 [T + 1]; only the last may be 0."""
    alpha_squared = np.append(1.0, alpha_bar_squared[1:] / alpha_bar_squared[:-1])
    squares = (alpha_squared, 1 - alpha_squared, alpha_bar_squared, 1 - alpha_bar_squared)
    with jax.ensure_compile_time_eval():
        return Schedule(*(jnp.asarray(x**0.5, jnp.float32) for x in squares))


def su_linear(num_steps: int = 1000, scale: float = 0.02) -> Schedule:
    """(18) of Su (2022): α_t = sqrt(1 − scale · t / T).

    β_T² equals `scale` for every T, so short chains leave signal in x_T: ᾱ_T is 0.0065
    at T = 1000 and 0.60 at T = 100. `Schedule.alpha_bar[-1]` holds ᾱ_T.
    """
    num_steps = checked("num_steps", num_steps, 1, MOST_STEPS)
    return from_beta_squared(scale * np.arange(1, num_steps + 1) / num_steps)


def ho_linear(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """Ho et al. (2020), section 4: β_t² runs linearly from `start` at t = 1 to `end` at t = T."""
    num_steps = checked("num_steps", num_steps, 1, MOST_STEPS)
    return from_beta_squared(np.linspace(start, end, num_steps))


def cosine(num_steps: int) -> Schedule:
    """(17) of Nichol & Dhariwal (2021): ᾱ_t² ∝ cos²((t/T + 0.008)/1.008 · π/2), with β_t² capped at 0.999."""
    num_steps = checked("num_steps", num_steps, 1, MOST_STEPS)
    f = np.cos((np.linspace(0, 1, num_steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return from_beta_squared(np.minimum(1 - f[1:] / f[:-1], 0.999))


def sigmoid(num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """Jabri et al. (2023), appendix B: ᾱ_t² falls as a logistic function of t/T, from 1 to 1e-9.

    Args:
      start, end: the piece of the logistic function, −3 and 3 in the paper.
      tau: its temperature; less than 1 leaves less time at either end.
    """
    num_steps = checked("num_steps", num_steps, 1, MOST_STEPS)
    f = 1 / (1 + np.exp(-np.linspace(start, end, num_steps + 1) / tau))
    return _from_alpha_bar_squared(np.maximum((f[-1] - f) / (f[-1] - f[0]), 1e-9))


def snr(s: Schedule) -> jax.Array:
    """SNR_t = (ᾱ_t/β̄_t)², the ratio of signal to noise. float32 [T + 1], infinite at t = 0."""
    return jnp.square(s.alpha_bar / s.beta_bar)


def _alpha_bar_squared(s):
    """Returns ᾱ_t² in float64 [T + 1], from β_t: 1 − ᾱ_t² is exact at small t too."""
    return np.cumprod(1 - np.asarray(s.beta, np.float64) ** 2)


def zero_terminal(s: Schedule) -> Schedule:
    """Returns the schedule with ᾱ_T = 0: ᾱ'_t = ᾱ_1 (ᾱ_t − ᾱ_T)/(ᾱ_1 − ᾱ_T), Lin et al. (2024), algorithm 1.

    x_T is then pure noise in training as in sampling. There ε̄ says nothing of x_0: the network must predict x_0 or v.

    Raises:
      ValueError: the schedule has one step.
    """
    if s.num_steps < 2:
        raise ValueError("zero_terminal needs a schedule of T >= 2 steps, not T=1")
    alpha_bar = np.sqrt(_alpha_bar_squared(s))
    first, last = alpha_bar[1], alpha_bar[-1]
    return _from_alpha_bar_squared(np.append(1.0, (first * (alpha_bar[1:] - last) / (first - last)) ** 2))


def shifted(s: Schedule, log_snr_shift: float) -> Schedule:
    """Returns the schedule with log SNR_t + log_snr_shift, Hoogeboom et al. (2023), (3).

    They shift a schedule that suits 64×64 pixels by 2 log(64/size): an average over more pixels hides more noise.
    """
    square = _alpha_bar_squared(s)
    scaled = np.exp(log_snr_shift) * square
    return _from_alpha_bar_squared(scaled / (scaled + 1 - square))


def sigma_zero(s: Schedule) -> jax.Array:
    """σ_t = 0, the greedy chain (16) of Su (2022). float32 [T + 1].

    The greedy chain returns E[x_0 | x_T]. With a good network that is close to the mean of the data.
    """
    return jnp.zeros_like(s.beta)


def sigma_beta(s: Schedule) -> jax.Array:
    """σ_t = β_t, (17) of Su (2022), "fixed large" in Ho et al.'s code. float32 [T + 1]."""
    return s.beta


def sigma_posterior(s: Schedule) -> jax.Array:
    """σ_t = β_t β̄_{t−1} / β̄_t, the standard deviation of q(x_{t−1} | x_t, x_0). float32 [T + 1].

    This is (7) of Ho et al. (2020), "fixed small" in their code. Entry 0 is 0 and unused.
    """
    return jnp.zeros_like(s.beta).at[1:].set(s.beta[1:] * s.beta_bar[:-1] / s.beta_bar[1:])


def sigma_analytic(s: Schedule, mean_square: ArrayLike) -> jax.Array:
    """σ_t² = σ̃_t² + (ᾱ_{t−1} β_t²/β̄_t²)² Var(x_0 | x_t), the best for a given network. float32 [T + 1].

    Var(x_0 | x_t) = (β̄_t²/ᾱ_t²)(1 − m_t) is the mean over x_t: Bao et al. (2022), theorem 1.

    Args:
      mean_square: [T + 1] m_t = E‖ε̄_θ(x_t, t)‖², a mean over entries; entry 0 is not used.
    """
    coefficient = jnp.zeros_like(s.beta).at[1:].set(s.alpha_bar[:-1] * s.beta[1:] ** 2 / s.beta_bar[1:] ** 2)
    return jnp.sqrt(sigma_posterior(s) ** 2 + coefficient**2 * x_0_variance(s, mean_square))


def x_0_variance(s: Schedule, mean_square: ArrayLike) -> jax.Array:
    """E[Var(x_0 | x_t)] = (β̄_t²/ᾱ_t²)(1 − m_t), at least 0, from m_t of `sigma_analytic`. float32 [T + 1].

    At ᾱ_T = 0, where m_T = 1 does not tell it, it is 1, the most that data in −1..1 can have. Entry 0 is 0.
    """
    share = jnp.maximum(1 - jnp.asarray(mean_square, jnp.float32), 0)
    variance = jnp.where(s.alpha_bar > 0, share / jnp.where(s.alpha_bar > 0, snr(s), 1.0), 1.0)
    return variance.at[0].set(0.0)
