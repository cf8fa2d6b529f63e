"""The variational bound on the likelihood of images, Ho et al. (2020), section 3 and table 4.

Images are on the grid of 256 levels, x = k / 127.5 − 1. Formulas of one step take a scalar t, as in
`process`; those of a batch, `vlb_term` and `vlb`, take the network:
eps_bar_fn(x [B, ...], t [B]) -> ε̄ [B, ...]. Forms are chosen so that float32 is enough.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr

from diffusion_jax import process
from diffusion_jax.schedule import Schedule, sigma_posterior

_HALF_BIN = 1 / 255  # of the 256 levels in [−1, 1]
_FLOOR = 1e-12  # of a probability, in Ho et al.'s code


def decoder_log_likelihood(x_0, mean, log_std, exact=True):
    """log of the mass that N(mean, exp(log_std)²) has within half a grey level of x_0, Ho et al. (2020), (13).

    The bins of the levels 0 and 255 are open outwards.

    Args:
      x_0: [...] on the grid of 256 levels.
      log_std: natural logarithm, broadcast to x_0.
      exact: by the normal distribution function; False: by Ho et al.'s approximation with tanh, with no
        mass below 1e-12, which is off by up to 0.1 nats at a pixel and by 3e-4 bits/dim in totals.

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
    flip = lower + upper > 0  # into the left tail, where the logarithm of Φ is exact
    left, right = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_right = log_ndtr(right)
    inside = log_right + jnp.log(-jnp.expm1(log_ndtr(left) - log_right))
    return jnp.where(darkest, log_ndtr(upper), jnp.where(brightest, log_ndtr(-lower), inside))


def _tanh_cdf(x):
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def prior_kl(s: Schedule, x_0):
    """KL(q(x_T | x_0) ‖ N(0, 1)) = (ᾱ_T² x_0² − ᾱ_T² − log(1 − ᾱ_T²)) / 2. [...] -> [...] nats."""
    square = s.alpha_bar[-1] ** 2
    return 0.5 * (square * (x_0**2 - 1) - jnp.log1p(-square))


def step_kl(s: Schedule, sigma, x_0, x_0_predicted, t):
    """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), t in 2..T, Ho et al. (2020), (8): [...] nats.

    The first is of the posterior's deviation σ̃_t, the second of σ_t; their means differ by
    ᾱ_{t−1} (β_t/β̄_t)² times the error of the predicted x_0. Infinite where sigma is 0.
    """
    log_ratio = 2 * (jnp.log(s.beta[t] * s.beta_bar[t - 1] / s.beta_bar[t]) - jnp.log(sigma[t]))
    shift = s.alpha_bar[t - 1] * (s.beta[t] / s.beta_bar[t]) ** 2 * (x_0 - x_0_predicted)
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio) + 0.5 * (shift / sigma[t]) ** 2


def default_decoder_std(s: Schedule) -> float:
    """The posterior sigma of t = 2, Ho et al.'s standard deviation of the decoder (that of t = 1 is 0).

    Raises:
      ValueError: T = 1 has no such step.
    """
    if s.num_steps < 2:
        raise ValueError("one step has no posterior sigma but 0: give decoder_std")
    return sigma_posterior(s)[2]


def vlb_term(eps_bar_fn, s: Schedule, sigma, x_0, t, eps_bar, *, clip=None, decoder_std=None, exact=True):
    """One term of the bound at x_t of (6), for each example: [B] bits/dim.

    t = 1 is the decoder, −log p(x_0 | x_1), with the deviation `decoder_std` whatever sigma is; the
    others are `step_kl`. The bound is the mean of `prior_kl` plus the sum over t = 1..T of this.

    Args:
      sigma: [T + 1] > 0 from t = 2 on, see `sampling.reverse_chain`.
      x_0: [B, ...] on the grid of 256 levels.
      t: int [B] in 1..T.
      eps_bar: [B, ...] standard normal.
      clip: bounds of the predicted x_0; Ho et al. have (-1, 1).
      decoder_std: see `default_decoder_std`.
      exact: see `decoder_log_likelihood`.
    """
    return _term(eps_bar_fn, s, sigma, x_0, t, eps_bar, clip, decoder_std, exact)[0]


def _term(eps_bar_fn, s, sigma, x_0, t, eps_bar, clip, decoder_std, exact):
    """(`vlb_term`, mean square error of the predicted x_0, (15)): [B] each."""
    decoder_std = default_decoder_std(s) if decoder_std is None else decoder_std
    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))
    x_t = jax.vmap(lambda *args: process.forward(s, *args))(x_0, t, eps_bar)
    predicted = eps_bar_fn(x_t, t)

    def one(x_0, x_t, t, eps_bar, predicted):
        x_0_predicted = process.predict_x_0(s, x_t, t, predicted)
        x_0_predicted = x_0_predicted if clip is None else jnp.clip(x_0_predicted, *clip)
        decoder = -decoder_log_likelihood(x_0, x_0_predicted, jnp.log(decoder_std), exact)
        later = jnp.maximum(t, 2)  # where t = 1 the KL is not used, and must not be infinite
        nats = jnp.where(t == 1, decoder, step_kl(s, sigma, x_0, x_0_predicted, later))
        errors = (x_0 - x_0_predicted) ** 2, (eps_bar - predicted) ** 2
        return jnp.mean(nats) / math.log(2), *map(jnp.mean, errors)

    return jax.vmap(one)(x_0, x_t, t, eps_bar, predicted)


def vlb_by_step(eps_bar_fn, s: Schedule, sigma, x_0, keys, *, clip=None, decoder_std=None, exact=True):
    """Every term of the bound in one `lax.scan` over t, for each example.

    The noise of example i at step t is drawn from fold_in(keys[i], t), once.

    Returns:
      (terms, squared_error, loss), float32 [T, B] each, row t − 1 of step t: `vlb_term` in bits/dim;
      the mean square error of the predicted x_0, in units of [−1, 1]; and (15), `losses.simple_loss`.
    """

    def step(_, t):
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), x_0.shape[1:]))(keys)
        ts = jnp.full(x_0.shape[:1], t)
        return None, _term(eps_bar_fn, s, sigma, x_0, ts, noise, clip, decoder_std, exact)

    return lax.scan(step, None, jnp.arange(1, s.num_steps + 1))[1]


def vlb(eps_bar_fn, s: Schedule, sigma, x_0, keys, *, clip=None, decoder_std=None, exact=True) -> dict:
    """The bound on −log2 p(x_0) per dimension, mean over the batch. Arguments of `vlb_by_step`.

    Returns:
      {"total", "prior", "decoder", "rate", "distortion", "terms" [T]}: total = prior + sum(terms) in
      bits/dim; decoder = terms[0]; rate = total − decoder, what Ho et al. call the rate; distortion is the
      root mean square error of the decoder's mean, on the scale 0..255.
    """
    terms, squared_error, _ = vlb_by_step(
        eps_bar_fn, s, sigma, x_0, keys, clip=clip, decoder_std=decoder_std, exact=exact
    )
    return summary(jnp.mean(prior_kl(s, x_0)) / math.log(2), jnp.mean(terms, axis=1), jnp.mean(squared_error[0]))


def summary(prior, terms, squared_error) -> dict:
    """What `vlb` returns, of means over examples: prior [], terms [T], squared_error [] of t = 1."""
    rate = prior + terms[1:].sum()
    return {
        "total": rate + terms[0],
        "prior": prior,
        "decoder": terms[0],
        "rate": rate,
        "distortion": 127.5 * squared_error**0.5,
        "terms": terms,
    }


def rate_distortion(prior, terms, squared_errors) -> tuple[np.ndarray, np.ndarray]:
    """Progressive coding, Ho et al. (2020), figure 5 and table 4, of means over examples.

    Returns:
      (rate, distortion), [T] each, entry t − 1 of step t: the bits/dim that tell x_t, and the root mean
      square error, on the scale 0..255, of the x_0 that x_t predicts.
    """
    terms, squared_errors = np.asarray(terms, np.float64), np.asarray(squared_errors, np.float64)
    rate = prior + np.cumsum(terms[::-1])[::-1] - terms
    return rate, 127.5 * np.sqrt(squared_errors)
