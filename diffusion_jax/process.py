"""The forward and the reverse process: one equation of Su (2022), one function.

Every function takes a scalar step t in 1..T (an int or an int array of shape []) and
arrays of one shape, whatever that is: one image, or a batch that shares t. For a batch
with a t each, use `jax.vmap`.

Two noises are told apart by name: `eps` is the noise ε_t of the single step t,
`eps_bar` the noise ε̄_t of the steps 1..t together, which the network predicts.
"""

import jax.numpy as jnp

from diffusion_jax.schedule import Schedule


def forward_step(s: Schedule, x_prev, t, eps):
    """(3): x_t = α_t x_{t−1} + β_t ε_t."""
    return s.alpha[t] * x_prev + s.beta[t] * eps


def forward(s: Schedule, x_0, t, eps_bar):
    """(6): x_t = ᾱ_t x_0 + β̄_t ε̄_t. Here t may be 0, which returns x_0."""
    return s.alpha_bar[t] * x_0 + s.beta_bar[t] * eps_bar


def step_noise(s: Schedule, eps_bar, t):
    """(12): E[ε_t | ε̄_t] = (β_t / β̄_t) ε̄_t; applied to the network's output, Su's ε_θ."""
    return s.beta[t] / s.beta_bar[t] * eps_bar


def reverse_step(s: Schedule, x_t, t, eps, noise=0.0):
    """(8), (16): μ(x_t) = (x_t − β_t ε) / α_t; with noise = σ_t z, (17).

    Args:
      eps: the noise of the single step t, i.e. `step_noise` of the network's output.
      noise: what is added to the mean, with its scale.
    """
    return (x_t - s.beta[t] * eps) / s.alpha[t] + noise


def predict_x_0(s: Schedule, x_t, t, eps_bar):
    """(6) solved for x_0: (x_t − β̄_t ε̄_t) / ᾱ_t."""
    return (x_t - s.beta_bar[t] * eps_bar) / s.alpha_bar[t]


def predict_eps_bar(s: Schedule, x_t, t, x_0):
    """(6) solved for ε̄_t: (x_t − ᾱ_t x_0) / β̄_t."""
    return (x_t - s.alpha_bar[t] * x_0) / s.beta_bar[t]


def velocity(s: Schedule, x_0, t, eps_bar):
    """v = ᾱ_t ε̄_t − β̄_t x_0, Salimans & Ho (2022), appendix D: what a network may predict instead of ε̄."""
    return s.alpha_bar[t] * eps_bar - s.beta_bar[t] * x_0


def predict_eps_bar_from_velocity(s: Schedule, x_t, t, v):
    """ε̄_t = ᾱ_t v + β̄_t x_t, which inverts `velocity` with (6)."""
    return s.alpha_bar[t] * v + s.beta_bar[t] * x_t


def variance_between(s: Schedule, t, u):
    """1 − (ᾱ_t/ᾱ_u)², the variance that the steps u+1..t add; β_t² for u = t − 1. 0 <= u < t.

    From the differences of ᾱ where it changes most, of β̄ where that does: in float32 the
    plain form is wrong by 6e-4 of itself where β² is 1e-4.
    """
    from_alpha = (s.alpha_bar[u] - s.alpha_bar[t]) * (s.alpha_bar[u] + s.alpha_bar[t])
    from_beta = (s.beta_bar[t] - s.beta_bar[u]) * (s.beta_bar[t] + s.beta_bar[u])
    return jnp.where(s.beta_bar[t] < s.alpha_bar[t], from_beta, from_alpha) / s.alpha_bar[u] ** 2


def posterior_mean(s: Schedule, x_0, x_t, t):
    """The mean of q(x_{t−1} | x_t, x_0), Ho et al. (2020), (7).

    (ᾱ_{t−1} β_t² x_0 + α_t β̄_{t−1}² x_t) / β̄_t²: where `reverse_step` leads when the
    network's prediction of x_0 is this x_0.
    """
    x_0_part = s.alpha_bar[t - 1] * s.beta[t] ** 2 * x_0
    x_t_part = s.alpha[t] * s.beta_bar[t - 1] ** 2 * x_t
    return (x_0_part + x_t_part) / s.beta_bar[t] ** 2
