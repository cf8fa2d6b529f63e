"""What Ho et al. (2020) show of a trained model in their figures 6, 7 and 8, and inpainting: arrays in, arrays out.

`eps_bar_fn`, `s`, `sigma`, `keys` and `clip` are those of `sampling.reverse_chain` throughout.
"""

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax import process, sampling
from diffusion_jax.schedule import Schedule


def interpolate(eps_bar_fn, s: Schedule, sigma, x_0, y_0, t: int, weights, key, clip=None):
    """Between two images by way of x_t, Ho et al. (2020), figure 8.

    Both are taken to step t with the same noise (6), mixed there, (1 − w) x_t + w y_t, which so
    keeps the noise of that step, and taken back by chains of the same noise.

    Args:
      x_0, y_0: [...] the two images.
      t: 1..T; the later, the more the chain invents.
      weights: [n] of y_0.
      key: one PRNG key, for all.

    Returns:
      [n, ...]; those of weight 0 and 1 are reconstructions.
    """
    eps_bar = jax.random.normal(jax.random.fold_in(key, sampling.LATENT), jnp.shape(x_0))
    x_t, y_t = (process.forward(s, image, t, eps_bar) for image in (x_0, y_0))
    mixed = jax.vmap(lambda weight: (1 - weight) * x_t + weight * y_t)(jnp.asarray(weights))
    keys = jnp.broadcast_to(key, mixed.shape[:1])
    return sampling.reverse_chain(eps_bar_fn, s, sigma, mixed, keys, start=t, clip=clip)


def progressive(eps_bar_fn, s: Schedule, sigma, x, keys, at, clip=None):
    """What the chain from x = x_T [B, ...] expects of x_0 on its way, Ho et al. (2020), figure 6.

    Args:
      at: int [k], steps in 0..T.

    Returns:
      [k, B, ...] the predictions of x_0 from x_t, t = at[0], at[1], ..., at 0 the finished images; no more of the
      chain is kept.
    """
    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))
    due = jnp.asarray(at).reshape(-1, *[1] * jnp.ndim(x))

    def step(carry, t):
        x, seen = carry
        x, x_0 = sampling.ancestral_step(eps_bar_fn, s, sigma, x, keys, t, clip)
        return (x, jnp.where(due == t, x_0[None], seen)), None

    seen = jnp.zeros((len(due), *x.shape))
    (x, seen), _ = lax.scan(step, (x, seen), jnp.arange(s.num_steps, 0, -1))
    return jnp.where(due == 0, x[None], seen)


def variations(eps_bar_fn, s: Schedule, sigma, x_t, t: int, keys, clip=None):
    """Images that share the latent x_t [...], one for each of the keys [B], Ho et al. (2020), figure 7. -> [B, ...]"""
    x = jnp.broadcast_to(x_t, (len(keys), *x_t.shape))
    return sampling.reverse_chain(eps_bar_fn, s, sigma, x, keys, start=t, clip=clip)


def inpaint(eps_bar_fn, s: Schedule, sigma, x_0, known, x, keys, clip=None):
    """The pixels that are not known, from a chain in which the known ones follow the forward process (6).

    Before each step t the known pixels of x_t are replaced by those of ᾱ_t x_0 + β̄_t ε̄, ε̄ of example
    i drawn from fold_in(keys[i], T + t). The chain never looks back (RePaint does), so an edge may show.

    Args:
      x_0: [B, ...] the images; what is not known of them is not used.
      known: bool, [B, ...] or what broadcasts to it.
      x: [B, ...] x_T.

    Returns:
      [B, ...] x_0 where known, bit for bit.
    """
    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))

    def step(x, t):
        noise = sampling.normal(keys, s.num_steps + t, x.shape[1:])
        x = jnp.where(known, process.forward(s, x_0, t, noise), x)
        return sampling.ancestral_step(eps_bar_fn, s, sigma, x, keys, t, clip)[0], None

    x, _ = lax.scan(step, x, jnp.arange(s.num_steps, 0, -1))
    return jnp.where(known, x_0, x)
