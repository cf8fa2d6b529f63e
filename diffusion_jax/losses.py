"""The training losses of Su (2022) and Ho et al. (2020), per example.

`eps_bar_fn(x [B, ...], t [B]) -> [B, ...]` is the network, which predicts ε̄_t; t [B]
holds steps in 1..T. Squared norms are means over the entries of an example (Su sums).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import likelihood, process
from diffusion_jax.schedule import Schedule


def mean_square(x):
    """‖x‖² of each example as a mean over its entries: [B, ...] -> [B]."""
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))


def weighted_step_loss(eps_bar_fn, s: Schedule, x_0, t, eps_bar_prev, eps):
    """(9): (β_t/α_t)² ‖ε_t − ε_θ‖², which is ‖x_{t−1} − μ(x_t)‖². -> [B]"""
    return (s.beta[t] / s.alpha[t]) ** 2 * step_loss(eps_bar_fn, s, x_0, t, eps_bar_prev, eps)


def step_loss(eps_bar_fn, s: Schedule, x_0, t, eps_bar_prev, eps):
    """(11): ‖ε_t − ε_θ(ᾱ_t x_0 + α_t β̄_{t−1} ε̄_{t−1} + β_t ε_t, t)‖². -> [B]

    Args:
      eps_bar_prev: [B, ...] ε̄_{t−1}, standard normal; unused where t = 1.
      eps: [B, ...] ε_t, standard normal, independent of it.
    """
    x_prev = _each(process.forward, s)(x_0, t - 1, eps_bar_prev)
    x_t = _each(process.forward_step, s)(x_prev, t, eps)
    return mean_square(eps - _each(process.step_noise, s)(eps_bar_fn(x_t, t), t))


def simple_loss(eps_bar_fn, s: Schedule, x_0, t, eps_bar):
    """(15): ‖ε̄ − (β̄_t/β_t) ε_θ(ᾱ_t x_0 + β̄_t ε̄, t)‖², Ho et al.'s L_simple. -> [B]

    The factor is in the network already: it predicts ε̄, of unit scale at every t.
    """
    x_t = _each(process.forward, s)(x_0, t, eps_bar)
    return mean_square(eps_bar - eps_bar_fn(x_t, t))


def x_0_loss(x_0_fn, s: Schedule, x_0, t, eps_bar):
    """‖x_0 − x̂_0(x_t, t)‖² for a network that predicts x_0: (15) times (β̄_t/ᾱ_t)². -> [B]"""
    return mean_square(x_0 - x_0_fn(_each(process.forward, s)(x_0, t, eps_bar), t))


def velocity_loss(velocity_fn, s: Schedule, x_0, t, eps_bar):
    """‖v − v̂(x_t, t)‖² for a network that predicts v: (15) divided by ᾱ_t², Salimans & Ho (2022). -> [B]"""
    x_t = _each(process.forward, s)(x_0, t, eps_bar)
    return mean_square(_each(process.velocity, s)(x_0, t, eps_bar) - velocity_fn(x_t, t))


def vlb_loss(eps_bar_fn, s: Schedule, sigma, x_0, t, eps_bar):
    """T times the term t of the variational bound, Ho et al.'s L (table 2): [B] bits/dim.

    Its mean over t uniform in 1..T is the bound less the prior's share, which no network changes.

    Args:
      sigma: as of `likelihood.vlb_term`, > 0 from t = 2 on.
    """
    return s.num_steps * likelihood.vlb_term(eps_bar_fn, s, sigma, x_0, t, eps_bar)


def importance(s: Schedule, sigma, deviation=0.5) -> np.ndarray:
    """How often to draw each t so that `vlb_loss`, divided by T times it, varies less: float64 [T + 1], sum 1.

    Proportional to the terms that the best network has on data N(0, deviation²), where they are known: unlike
    Nichol & Dhariwal's (2021) averages of past losses it is a function of t alone. Entry 0 is 0.
    """
    alpha_bar, beta, beta_bar, sigma = (np.asarray(x, np.float64) for x in (s.alpha_bar, s.beta, s.beta_bar, sigma))
    error = deviation**2 * beta_bar**2 / (alpha_bar**2 * deviation**2 + beta_bar**2)  # of x_0, squared
    std, p = float(likelihood.default_decoder_std(s)), np.zeros(s.num_steps + 1)
    p[1] = 0.5 * error[1] / std**2 + max(0.0, np.log(std * np.sqrt(2 * np.pi) * 127.5))
    log_ratio = 2 * np.log(beta[2:] * beta_bar[1:-1] / (beta_bar[2:] * sigma[2:]))
    shift = alpha_bar[1:-1] * (beta[2:] / beta_bar[2:]) ** 2 / sigma[2:]
    p[2:] = 0.5 * (np.expm1(log_ratio) - log_ratio) + 0.5 * shift**2 * error[2:]
    return p / p.sum()


def with_noise(loss: Callable, num_noises: int) -> Callable:
    """A loss that draws its noises: (eps_bar_fn, s, x_0, t, keys [B]) -> [B].

    Noise k of example i comes from fold_in(keys[i], k) alone, so that it does not
    depend on the batch or the device that the example is in.
    """

    def drawn(eps_bar_fn, s, x_0, t, keys):
        def normal(key, k):
            return jax.random.normal(jax.random.fold_in(key, k), x_0.shape[1:])

        noises = [jax.vmap(normal, (0, None))(keys, k) for k in range(num_noises)]
        return loss(eps_bar_fn, s, x_0, t, *noises)

    return drawn


def _each(formula, s):
    """A formula of one example, for a batch with a t each."""
    return jax.vmap(lambda *args: formula(s, *args))
