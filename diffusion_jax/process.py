"""The forward and the reverse process: one function for each equation of Su (2022).

Every function takes a scalar step t in 1..T (an int or an int array of shape []) and
arrays of one common shape: one image, or a batch that shares t. `jax.vmap` maps a
function over a batch with one t per example. A t that is known, not traced, is checked: ValueError.

Two noises have two names: `eps` is the noise ε_t of the single step t, `eps_bar` the
noise ε̄_t of the steps 1..t together. The network predicts `eps_bar`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.schedule import Schedule, checked, sigma_posterior

# (x [B, ...], t [B] in 1..T) -> ε̄ [B, ...], or the Prediction of a network that knows more
Network = Callable[[jax.Array, jax.Array], Any]


class Prediction(NamedTuple):
    """The output of a network at x_t: arrays of its shape."""

    eps_bar: jax.Array
    x_0: jax.Array | None = None  # None: `predict_x_0` of eps_bar, which does not tell it at ᾱ_T = 0
    sigma: jax.Array | None = None  # the deviation of the reverse step; None: that of the chain


def prediction(output: jax.Array | Prediction) -> Prediction:
    """Returns the output of a `Network` as a Prediction."""
    return output if isinstance(output, Prediction) else Prediction(output)


def forward_step(s: Schedule, x_prev: jax.Array, t: ArrayLike, eps: jax.Array) -> jax.Array:
    """(3): x_t = α_t x_{t−1} + β_t ε_t."""
    checked("t", t, 1, s.num_steps)
    return s.alpha[t] * x_prev + s.beta[t] * eps


def forward(s: Schedule, x_0: jax.Array, t: ArrayLike, eps_bar: jax.Array) -> jax.Array:
    """(6): x_t = ᾱ_t x_0 + β̄_t ε̄_t. Here t may be 0, which returns x_0."""
    checked("t", t, 0, s.num_steps)
    return s.alpha_bar[t] * x_0 + s.beta_bar[t] * eps_bar


def step_noise(s: Schedule, eps_bar: jax.Array, t: ArrayLike) -> jax.Array:
    """(12): E[ε_t | ε̄_t] = (β_t / β̄_t) ε̄_t. With the network's output as ε̄_t this is Su's ε_θ."""
    checked("t", t, 1, s.num_steps)
    return s.beta[t] / s.beta_bar[t] * eps_bar


def reverse_step(s: Schedule, x_t: jax.Array, t: ArrayLike, eps: jax.Array, noise: ArrayLike = 0.0) -> jax.Array:
    """(8), (16): μ(x_t) = (x_t − β_t ε) / α_t. With noise = σ_t z this is (17).

    Args:
      eps: the noise of the single step t, which is `step_noise` of the network's output.
      noise: σ_t z, added to the mean.
    """
    checked("t", t, 1, s.num_steps)
    return (x_t - s.beta[t] * eps) / s.alpha[t] + noise


def predict_x_0(s: Schedule, x_t: jax.Array, t: ArrayLike, eps_bar: jax.Array) -> jax.Array:
    """(6) solved for x_0: (x_t − β̄_t ε̄_t) / ᾱ_t."""
    checked("t", t, 1, s.num_steps)
    return (x_t - s.beta_bar[t] * eps_bar) / s.alpha_bar[t]


def x_0_of(s: Schedule, x_t: jax.Array, t: ArrayLike, found: Prediction) -> jax.Array:
    """Returns the network's own x_0, or `predict_x_0` of its ε̄."""
    return predict_x_0(s, x_t, t, found.eps_bar) if found.x_0 is None else found.x_0


def predict_eps_bar(s: Schedule, x_t: jax.Array, t: ArrayLike, x_0: jax.Array) -> jax.Array:
    """(6) solved for ε̄_t: (x_t − ᾱ_t x_0) / β̄_t."""
    checked("t", t, 1, s.num_steps)
    return (x_t - s.alpha_bar[t] * x_0) / s.beta_bar[t]


def velocity(s: Schedule, x_0: jax.Array, t: ArrayLike, eps_bar: jax.Array) -> jax.Array:
    """v = ᾱ_t ε̄_t − β̄_t x_0, Salimans & Ho (2022), appendix D. A network may predict v in place of ε̄."""
    checked("t", t, 1, s.num_steps)
    return s.alpha_bar[t] * eps_bar - s.beta_bar[t] * x_0


def predict_eps_bar_from_velocity(s: Schedule, x_t: jax.Array, t: ArrayLike, v: jax.Array) -> jax.Array:
    """ε̄_t = ᾱ_t v + β̄_t x_t, from `velocity` and (6)."""
    checked("t", t, 1, s.num_steps)
    return s.alpha_bar[t] * v + s.beta_bar[t] * x_t


def predict_x_0_from_velocity(s: Schedule, x_t: jax.Array, t: ArrayLike, v: jax.Array) -> jax.Array:
    """x_0 = ᾱ_t x_t − β̄_t v, from `velocity` and (6)."""
    checked("t", t, 1, s.num_steps)
    return s.alpha_bar[t] * x_t - s.beta_bar[t] * v


def interpolated_sigma(s: Schedule, t: ArrayLike, v: jax.Array) -> jax.Array:
    """log σ_t = ν log β_t + (1 − ν) log σ̃_t with ν = (v + 1)/2, Nichol & Dhariwal (2021), (15). [...] -> [...]

    σ̃_2 takes the place of σ̃_1, which is 0. The schedule has at least two steps.

    Args:
      v: the network's second output; −1 is the posterior's deviation and 1 is β_t.
    """
    checked("t", t, 1, s.num_steps)
    smallest, nu = sigma_posterior(s)[jnp.maximum(t, 2)], (v + 1) / 2
    return jnp.exp(nu * jnp.log(s.beta[t]) + (1 - nu) * jnp.log(smallest))


def variance_between(s: Schedule, t: ArrayLike, u: ArrayLike) -> jax.Array:
    """1 − (ᾱ_t/ᾱ_u)², the variance that the steps u+1..t add, for 0 <= u < t. It is β_t² for u = t − 1.

    Evaluated as written in float32, the formula has a relative error of 6e-4 where β² is 1e-4.
    The code takes the difference of ᾱ² or of β̄², whichever changes faster at t.
    """
    checked("t", t, 1, s.num_steps), checked("u", u, 0, s.num_steps - 1)
    from_alpha = (s.alpha_bar[u] - s.alpha_bar[t]) * (s.alpha_bar[u] + s.alpha_bar[t])
    from_beta = (s.beta_bar[t] - s.beta_bar[u]) * (s.beta_bar[t] + s.beta_bar[u])
    return jnp.where(s.beta_bar[t] < s.alpha_bar[t], from_beta, from_alpha) / s.alpha_bar[u] ** 2


def posterior_mean(s: Schedule, x_0: jax.Array, x_t: jax.Array, t: ArrayLike) -> jax.Array:
    """(ᾱ_{t−1} β_t² x_0 + α_t β̄_{t−1}² x_t) / β̄_t², the mean of q(x_{t−1} | x_t, x_0): Ho et al. (2020), (7).

    It equals the mean of `reverse_step` if x_0 is the network's prediction of x_0.
    """
    checked("t", t, 1, s.num_steps)
    x_0_part = s.alpha_bar[t - 1] * s.beta[t] ** 2 * x_0
    x_t_part = s.alpha[t] * s.beta_bar[t - 1] ** 2 * x_t
    return (x_0_part + x_t_part) / s.beta_bar[t] ** 2
