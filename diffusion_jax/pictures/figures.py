"""Interpolation, progressive generation and variations, Ho et al. (2020), figures 6 to 8, and inpainting.

Every function takes and returns arrays. `eps_bar_fn`, `s`, `sigma`, `keys` and `clip` are those of
`sampling.reverse_chain`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from diffusion_jax import process, sampling
from diffusion_jax.pictures import edits
from diffusion_jax.process import Network
from diffusion_jax.schedule import Schedule, checked


def interpolate(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: jax.Array,
    y_0: jax.Array,
    t: int,
    weights: ArrayLike,
    key: jax.Array,
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """Interpolates between two images in the latent space of step t, Ho et al. (2020), figure 8.

    (6) takes both images to step t with the same noise, so the mixture (1 − w) x_t + w y_t has the
    noise level of that step. Chains that share their noise take the mixtures back to images.

    Args:
      x_0, y_0: [...] the two images.
      t: in 1..T. A larger t keeps less of the two images.
      weights: [n] weights of y_0.
      key: one PRNG key for all noise.

    Returns:
      [n, ...]. Weights 0 and 1 give reconstructions of x_0 and y_0.
    """
    eps_bar = jax.random.normal(jax.random.fold_in(key, sampling.LATENT), jnp.shape(x_0), jnp.float32)
    x_t, y_t = (process.forward(s, image, t, eps_bar) for image in (x_0, y_0))
    mixed = jax.vmap(lambda weight: (1 - weight) * x_t + weight * y_t)(jnp.asarray(weights, jnp.float32))
    keys = jnp.broadcast_to(key, mixed.shape[:1])
    return sampling.reverse_chain(eps_bar_fn, s, sigma, mixed, keys, start=t, clip=clip)


def progressive(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x: jax.Array,
    keys: jax.Array,
    at: ArrayLike | Sequence[int],
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """Returns the chain's predictions of x_0 at the steps `at`, Ho et al. (2020), figure 6.

    The chain runs once and stores only these k predictions.

    Args:
      x: [B, ...] x_T.
      at: int [k], steps in 0..T.

    Returns:
      [k, B, ...], entry j predicted from x_t with t = at[j]. Step 0 gives the finished images.
    """
    s, sigma = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (s, sigma))
    steps = jnp.asarray(checked("at", at, 0, s.num_steps, ndim=1), jnp.int32).reshape(-1, *[1] * jnp.ndim(x))

    def step(carry, t):
        x, predictions = carry
        x, x_0 = sampling.ancestral_step(eps_bar_fn, s, sigma, x, keys, t, clip)
        return (x, jnp.where(steps == t, x_0[None], predictions)), None

    predictions = jnp.zeros((len(steps), *x.shape), jnp.float32)
    (x, predictions), _ = lax.scan(step, (x, predictions), jnp.arange(s.num_steps, 0, -1, dtype=jnp.int32))
    return jnp.where(steps == 0, x[None], predictions)


def variations(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_t: jax.Array,
    t: int,
    keys: jax.Array,
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """Returns images that share the latent x_t [...], one for each key: [B, ...]. Ho et al. (2020), figure 7."""
    x = jnp.broadcast_to(x_t, (len(keys), *x_t.shape))
    return sampling.reverse_chain(eps_bar_fn, s, sigma, x, keys, start=t, clip=clip)


def inpaint(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: ArrayLike,
    known: ArrayLike,
    x: ArrayLike,
    keys: jax.Array,
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """Fills in unknown pixels by one chain whose known pixels follow the forward process (6).

    This is `edits.repaint` with repeats=1, where the arguments are described: a chain that never goes back up, so an
    edge may be visible. The ε̄ of example i at step t is drawn from fold_in(keys[i], T + t).

    Returns:
      [B, ...], equal to x_0 at known pixels, bit for bit.
    """
    return edits.repaint(eps_bar_fn, s, sigma, x_0, known, x, keys, clip, jump=1, repeats=1)
