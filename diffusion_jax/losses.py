"""The training losses of Su (2022) and Ho et al. (2020), one number per example.

`eps_bar_fn(x [B, ...], t [B]) -> [B, ...]` is the network, which predicts ε̄_t. `x_0` is [B, ...]
and `t` int [B] in 1..T. Squared norms are means over the entries of an example (Su sums).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import likelihood, process, schedule
from diffusion_jax.process import Network
from diffusion_jax.schedule import Schedule


def mean_square(x: jax.Array) -> jax.Array:
    """‖x‖² of each example, as a mean over its entries: [B, ...] -> [B]."""
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))


def weighted_step_loss(
    eps_bar_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar_prev: jax.Array, eps: jax.Array
) -> jax.Array:
    """(9): (β_t/α_t)² ‖ε_t − ε_θ‖² = ‖x_{t−1} − μ(x_t)‖². -> [B]

    The arguments are those of `step_loss`.
    """
    return (s.beta[t] / s.alpha[t]) ** 2 * step_loss(eps_bar_fn, s, x_0, t, eps_bar_prev, eps)


def step_loss(
    eps_bar_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar_prev: jax.Array, eps: jax.Array
) -> jax.Array:
    """(11): ‖ε_t − ε_θ(ᾱ_t x_0 + α_t β̄_{t−1} ε̄_{t−1} + β_t ε_t, t)‖². -> [B]

    Args:
      eps_bar_prev: [B, ...] ε̄_{t−1}, standard normal. Examples at t = 1 do not use it.
      eps: [B, ...] ε_t, standard normal and independent of `eps_bar_prev`.
    """
    x_prev = _per_example(process.forward, s)(x_0, t - 1, eps_bar_prev)
    x_t = _per_example(process.forward_step, s)(x_prev, t, eps)
    return mean_square(eps - _per_example(process.step_noise, s)(eps_bar_fn(x_t, t), t))


def simple_loss(eps_bar_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar: jax.Array) -> jax.Array:
    """(15): ‖ε̄ − (β̄_t/β_t) ε_θ(ᾱ_t x_0 + β̄_t ε̄, t)‖², Ho et al.'s L_simple. -> [B]

    The network predicts ε̄ and so already contains the factor β̄_t/β_t.
    """
    x_t = _per_example(process.forward, s)(x_0, t, eps_bar)
    return mean_square(eps_bar - eps_bar_fn(x_t, t))


def x_0_loss(x_0_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar: jax.Array) -> jax.Array:
    """‖x_0 − x̂_0(x_t, t)‖² for a network that predicts x_0: (15) times (β̄_t/ᾱ_t)². -> [B]"""
    return mean_square(x_0 - x_0_fn(_per_example(process.forward, s)(x_0, t, eps_bar), t))


def velocity_loss(velocity_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar: jax.Array) -> jax.Array:
    """‖v − v̂(x_t, t)‖² for a network that predicts v: (15) divided by ᾱ_t², Salimans & Ho (2022). -> [B]"""
    x_t = _per_example(process.forward, s)(x_0, t, eps_bar)
    return mean_square(_per_example(process.velocity, s)(x_0, t, eps_bar) - velocity_fn(x_t, t))


def vlb_loss(
    eps_bar_fn: Network, s: Schedule, sigma: jax.Array, x_0: jax.Array, t: jax.Array, eps_bar: jax.Array
) -> jax.Array:
    """T times term t of the variational bound, Ho et al.'s L (table 2): [B] bits/dim.

    Its mean over t uniform in 1..T is the bound without the prior term, which does not depend on the network.

    Args:
      sigma: [T + 1], > 0 from t = 2 on, see `likelihood.vlb_term`.
    """
    return s.num_steps * likelihood.vlb_term(eps_bar_fn, s, sigma, x_0, t, eps_bar)


def hybrid_loss(
    prediction_fn: Network, s: Schedule, x_0: jax.Array, t: jax.Array, eps_bar: jax.Array, share: float = 1e-3
) -> jax.Array:
    """`simple_loss` + share · `vlb_loss`, whose gradient reaches σ alone: Nichol & Dhariwal (2021), (16). -> [B]

    Args:
      prediction_fn: (x, t) -> `process.Prediction` with sigma.
    """
    found = prediction_fn(_per_example(process.forward, s)(x_0, t, eps_bar), t)
    fixed = found._replace(eps_bar=jax.lax.stop_gradient(found.eps_bar))
    bound = vlb_loss(lambda *_: fixed, s, schedule.sigma_beta(s), x_0, t, eps_bar)
    return mean_square(eps_bar - found.eps_bar) + share * bound


def importance(s: Schedule, sigma: ArrayLike, deviation: float = 0.5) -> np.ndarray:
    """Returns the probabilities of t for importance sampling of `vlb_loss`: float64 [T + 1] with sum 1.

    With t drawn from p_t, `vlb_loss` divided by T p_t varies less than `vlb_loss` with uniform t. p_t is proportional
    to term t of the optimal network on data N(0, deviation²), which has a closed form. Nichol & Dhariwal (2021)
    use averages of past losses instead. Entry 0 is 0.
    """
    alpha_bar, beta, beta_bar, sigma = (np.asarray(x, np.float64) for x in (s.alpha_bar, s.beta, s.beta_bar, sigma))
    error = deviation**2 * beta_bar**2 / (alpha_bar**2 * deviation**2 + beta_bar**2)  # E[(x_0 − E[x_0 | x_t])²]
    std, p = float(likelihood.default_decoder_std(s)), np.zeros(s.num_steps + 1)
    p[1] = 0.5 * error[1] / std**2 + max(0.0, np.log(std * np.sqrt(2 * np.pi) * 127.5))
    log_ratio = 2 * np.log(beta[2:] * beta_bar[1:-1] / (beta_bar[2:] * sigma[2:]))
    shift = alpha_bar[1:-1] * (beta[2:] / beta_bar[2:]) ** 2 / sigma[2:]
    p[2:] = 0.5 * (np.expm1(log_ratio) - log_ratio) + 0.5 * shift**2 * error[2:]
    return p / p.sum()


def min_snr_weight(s: Schedule, gamma: float = 5.0, prediction: str = "eps_bar") -> jax.Array:
    """min(SNR_t, γ)/SNR_t, Hang et al. (2023): (15) as the error of x_0, whose weight SNR_t is cut at γ > 0.

    Args:
      prediction: the loss that the weight is for: "eps_bar" for `simple_loss`, "x_0" for `x_0_loss`, "velocity" for
        `velocity_loss`. The weighted losses are the same number. float32 [T + 1]; entry 0 is 0.
    """
    return _weight_for(prediction, s, jnp.minimum(1.0, gamma / schedule.snr(s)))


def p2_weight(s: Schedule, k: float = 1.0, gamma: float = 1.0, prediction: str = "eps_bar") -> jax.Array:
    """(k + SNR_t)^−γ, Choi et al. (2022), (8). float32 [T + 1]; `prediction` is that of `min_snr_weight`."""
    return _weight_for(prediction, s, (k + schedule.snr(s)) ** -gamma)


def _weight_for(prediction, s, weight):
    """Converts a weight of (15) to that of the loss of another output, see `x_0_loss` and `velocity_loss`."""
    factor = {"eps_bar": jnp.ones_like(s.beta), "x_0": schedule.snr(s), "velocity": s.alpha_bar**2}[prediction]
    return jnp.append(0.0, factor[1:] * weight[1:])


def with_noise(loss: Callable[..., jax.Array], num_noises: int) -> Callable[..., jax.Array]:
    """Returns `loss` with its noises drawn from keys: (eps_bar_fn, s, x_0, t, keys [B]) -> [B].

    Noise k of example i is a function of fold_in(keys[i], k) alone, so it does not depend on
    the batch or the device that holds the example.

    Args:
      loss: (eps_bar_fn, s, x_0, t, *noises) -> [B], with `num_noises` arrays shaped like x_0.
    """

    def noisy_loss(eps_bar_fn, s, x_0, t, keys):
        def normal(key, k):
            return jax.random.normal(jax.random.fold_in(key, k), x_0.shape[1:], jnp.float32)

        noises = [jax.vmap(normal, (0, None))(keys, k) for k in range(num_noises)]
        return loss(eps_bar_fn, s, x_0, t, *noises)

    return noisy_loss


def _per_example(formula, s):
    """Maps a formula of one example over a batch with one t per example."""
    return jax.vmap(lambda *args: formula(s, *args))
