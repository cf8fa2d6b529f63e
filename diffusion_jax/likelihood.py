"""The variational bound on the likelihood of images, Ho et al. (2020), section 3 and table 4.

Images lie on the grid of 256 levels, x = k / 127.5 − 1. Formulas of one step take a scalar t, as in
`process`. `vlb_term`, `vlb_by_step` and `vlb` take a batch and the network, eps_bar_fn(x [B, ...], t [B]) -> ε̄
[B, ...]. Every formula has a form that float32 computes accurately.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike

from diffusion_jax import process
from diffusion_jax.process import Network
from diffusion_jax.schedule import Schedule, sigma_posterior

_HALF_BIN = 1 / 255  # half the distance between two of the 256 levels in [−1, 1]
_FLOOR = 1e-12  # Ho et al.'s code clips probabilities here


def decoder_log_likelihood(x_0: jax.Array, mean: jax.Array, log_std: jax.Array, exact: bool = True) -> jax.Array:
    """Returns log P(|y − x_0| < half a grey level) for y ~ N(mean, exp(log_std)²), Ho et al. (2020), (13).

    The bin of level 0 extends to −∞, the bin of level 255 to ∞.

    Args:
      x_0: [...] on the grid of 256 levels.
      mean: broadcasts to x_0.
      log_std: natural logarithm, broadcasts to x_0.
      exact: True uses the normal distribution function. False uses Ho et al.'s approximation with tanh and their
        floor of 1e-12. The approximation is off by up to 0.1 nats at a pixel and by 3e-4 bits/dim in totals.

    Returns:
      [...] nats.
    """
    inverse_std = jnp.exp(-log_std)
    lower, upper = ((x_0 - mean + offset) * inverse_std for offset in (-_HALF_BIN, _HALF_BIN))
    darkest, brightest = x_0 < -1 + _HALF_BIN, x_0 > 1 - _HALF_BIN
    if not exact:
        below, above = _tanh_cdf(lower), _tanh_cdf(upper)
        mass = jnp.where(darkest, above, jnp.where(brightest, 1 - below, above - below))
        return jnp.log(jnp.maximum(mass, _FLOOR))
    flip = lower + upper > 0  # mirrors the bin into the left tail, where log Φ is accurate
    left, right = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_right = log_ndtr(right)
    inside = log_right + jnp.log(-jnp.expm1(log_ndtr(left) - log_right))
    return jnp.where(darkest, log_ndtr(upper), jnp.where(brightest, log_ndtr(-lower), inside))


def _tanh_cdf(x):
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def prior_kl(s: Schedule, x_0: jax.Array) -> jax.Array:
    """KL(q(x_T | x_0) ‖ N(0, 1)) = (ᾱ_T² x_0² − ᾱ_T² − log(1 − ᾱ_T²)) / 2. [...] -> [...] nats."""
    square = s.alpha_bar[-1] ** 2
    return 0.5 * (square * (x_0**2 - 1) - jnp.log1p(-square))


def step_kl(s: Schedule, sigma: jax.Array, x_0: jax.Array, x_0_predicted: jax.Array, t: ArrayLike) -> jax.Array:
    """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) for t in 2..T, Ho et al. (2020), (8). [...] nats.

    q has the standard deviation σ̃_t of the posterior, p has σ_t. Their means differ by
    ᾱ_{t−1} (β_t/β̄_t)² times the error of the predicted x_0. The KL is infinite where sigma is 0.

    Args:
      sigma: [T + 1] standard deviations σ_t.
      x_0: [...] data.
      x_0_predicted: [...] prediction of x_0 from x_t.
    """
    return _kl(s, sigma[t], x_0, x_0_predicted, t)


def _kl(s, deviation, x_0, x_0_predicted, t):
    """Returns `step_kl` with σ_t = `deviation`, which broadcasts to x_0."""
    log_ratio = 2 * (jnp.log(s.beta[t] * s.beta_bar[t - 1] / s.beta_bar[t]) - jnp.log(deviation))
    shift = s.alpha_bar[t - 1] * (s.beta[t] / s.beta_bar[t]) ** 2 * (x_0 - x_0_predicted)
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio) + 0.5 * (shift / deviation) ** 2


def default_decoder_std(s: Schedule) -> jax.Array:
    """Returns the posterior sigma of t = 2, Ho et al.'s standard deviation of the decoder: float32 [].

    The posterior sigma of t = 1 is 0.

    Raises:
      ValueError: the schedule has one step.
    """
    if s.num_steps < 2:
        raise ValueError("decoder_std=None needs a schedule of T >= 2 steps, not T=1: give decoder_std")
    return sigma_posterior(s)[2]


def vlb_term(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: jax.Array,
    t: ArrayLike,
    eps_bar: ArrayLike,
    *,
    clip: tuple[float, float] | None = None,
    decoder_std: ArrayLike | None = None,
    exact: bool = True,
) -> jax.Array:
    """Returns term t of the bound for each example, at the x_t of (6): [B] bits/dim.

    Term 1 is the decoder, −log p(x_0 | x_1), with the standard deviation `decoder_std` in place of
    σ_1. The other terms are `step_kl`. A network that returns a `process.Prediction` with sigma gives the deviations of
    all of them. The bound is the mean of `prior_kl` plus the sum of terms 1..T.

    Args:
      sigma: [T + 1], > 0 from t = 2 on, see `sampling.reverse_chain`.
      x_0: [B, ...] on the grid of 256 levels.
      t: int [B] in 1..T.
      eps_bar: [B, ...] standard normal.
      clip: (lo, hi) bounds the predicted x_0; Ho et al. use (-1, 1).
      decoder_std: standard deviation of the decoder; None is `default_decoder_std`.
      exact: see `decoder_log_likelihood`.
    """
    return _term(eps_bar_fn, s, sigma, x_0, t, eps_bar, clip, decoder_std, exact)[0]


def _term(eps_bar_fn, s, sigma, x_0, t, eps_bar, clip, decoder_std, exact):
    """Returns (`vlb_term`, mean squared error of the predicted x_0, `losses.simple_loss`, mean of ε̄_θ²): [B] each."""
    decoder_std = default_decoder_std(s) if decoder_std is None else decoder_std
    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))
    x_t = jax.vmap(lambda *args: process.forward(s, *args))(x_0, t, eps_bar)

    def of_example(x_0, x_t, t, eps_bar, found):
        x_0_predicted = process.x_0_of(s, x_t, t, found)
        x_0_predicted = x_0_predicted if clip is None else jnp.clip(x_0_predicted, *clip)
        kl_step = jnp.maximum(t, 2)  # keeps the KL finite at t = 1, where it is not used
        of_decoder, of_step = (decoder_std, sigma[kl_step]) if found.sigma is None else (found.sigma, found.sigma)
        decoder = -decoder_log_likelihood(x_0, x_0_predicted, jnp.log(of_decoder), exact)
        nats = jnp.where(t == 1, decoder, _kl(s, of_step, x_0, x_0_predicted, kl_step))
        squares = (x_0 - x_0_predicted) ** 2, (eps_bar - found.eps_bar) ** 2, found.eps_bar**2
        return jnp.mean(nats) / math.log(2), *map(jnp.mean, squares)

    return jax.vmap(of_example)(x_0, x_t, t, eps_bar, process.prediction(eps_bar_fn(x_t, t)))


def vlb_by_step(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: jax.Array,
    keys: jax.Array,
    *,
    clip: tuple[float, float] | None = None,
    decoder_std: ArrayLike | None = None,
    exact: bool = True,
    ts: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns every term of the bound for each example, computed in one `lax.scan` over t.

    Args:
      ts: int [n] or [n, B] in 1..T, the terms to compute, in rows of [n, B] in place of [T, B]; None is all of them.
      keys: [B] PRNG keys. The noise of example i at step t is drawn once, from fold_in(keys[i], t).
      sigma, x_0, clip, decoder_std, exact: see `vlb_term`.

    Returns:
      (terms, squared_error, loss, mean_square), float32 [T, B] each, step t in row t − 1. `terms` are `vlb_term` in
      bits/dim, `squared_error` is the mean squared error of the predicted x_0 on the scale [−1, 1], `loss` is
      (15), `losses.simple_loss`, `mean_square` is the mean of the predicted ε̄², for `schedule.sigma_analytic`.
    """

    def noise(key, t):
        return jax.random.normal(jax.random.fold_in(key, t), x_0.shape[1:], jnp.float32)

    def step(_, t):
        t = jnp.broadcast_to(t, x_0.shape[:1])
        return None, _term(eps_bar_fn, s, sigma, x_0, t, jax.vmap(noise)(keys, t), clip, decoder_std, exact)

    return lax.scan(step, None, jnp.arange(1, s.num_steps + 1) if ts is None else jnp.asarray(ts))[1]


def vlb(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: jax.Array,
    keys: jax.Array,
    *,
    clip: tuple[float, float] | None = None,
    decoder_std: ArrayLike | None = None,
    exact: bool = True,
) -> dict[str, jax.Array]:
    """Returns the bound on −log2 p(x_0) per dimension, as a mean over the batch.

    The arguments are those of `vlb_by_step`.

    Returns:
      {"total", "prior", "decoder", "rate", "distortion", "terms" [T]}. total = prior + sum(terms) in bits/dim,
      decoder = terms[0], rate = total − decoder as in Ho et al. "distortion" is the root mean square
      error of the decoder's mean on the scale 0..255.
    """
    terms, squared_error, *_ = vlb_by_step(
        eps_bar_fn, s, sigma, x_0, keys, clip=clip, decoder_std=decoder_std, exact=exact
    )
    prior, terms, squared_error = jnp.mean(prior_kl(s, x_0)) / math.log(2), terms.mean(axis=1), squared_error[0].mean()
    rate = prior + terms[1:].sum()
    return {
        "total": rate + terms[0],
        "prior": prior,
        "decoder": terms[0],
        "rate": rate,
        "distortion": 127.5 * squared_error**0.5,
        "terms": terms,
    }
