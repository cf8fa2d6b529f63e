"""From noise to data: the reverse chain as one `lax.scan`, and `sample_fn` around it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusion_jax import process
from diffusion_jax.schedule import Schedule

LATENT = 0  # what fold_in(key, LATENT) draws is x_T; step t of the chain, 1..T, draws from fold_in(key, t)


def normal(keys, t, shape):
    """Standard normal noise of step t, example i from fold_in(keys[i], t): [B, *shape] float32."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def reverse_chain(eps_bar_fn, s: Schedule, sigma, x, keys, start=None, stop=0, clip=None):
    """(17) for t = start, ..., stop + 1 in one `lax.scan`: from x_start to x_stop.

    With sigma = 0 it is the greedy chain (16). No noise is added at t = 1 (Ho et al.,
    algorithm 2; Su's code adds σ_1 z there, half a grey level).

    Args:
      eps_bar_fn: (x [B, ...], t [B]) -> ε̄ [B, ...], the network.
      sigma: [T + 1] standard deviation of the noise of each step.
      x: [B, ...] x_start.
      keys: [B] PRNG keys; the noise of example i at step t is drawn from
        fold_in(keys[i], t) and from nothing else, so chains compose: T -> k -> 0 is T -> 0.
      start, stop: Python ints, T >= start >= stop >= 0; start defaults to T.
      clip: (lo, hi) bounds the prediction of x_0 inside the chain, as Ho et al. do and
        Su does not; None leaves it free.

    Returns:
      [B, ...] x_stop.

    Raises:
      ValueError: start or stop out of range.
    """
    start = s.num_steps if start is None else start
    if not s.num_steps >= start >= stop >= 0:
        raise ValueError(f"need T >= start >= stop >= 0, not T={s.num_steps}, start={start}, stop={stop}")

    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))

    def step(x, t):
        eps_bar = eps_bar_fn(x, jnp.full(x.shape[:1], t))
        noise = jnp.where(t > 1, sigma[t], 0.0) * normal(keys, t, x.shape[1:])
        if clip is None:
            return process.reverse_step(s, x, t, process.step_noise(s, eps_bar, t), noise), None
        x_0 = jnp.clip(process.predict_x_0(s, x, t, eps_bar), *clip)
        return process.posterior_mean(s, x_0, x, t) + noise, None

    return lax.scan(step, x, jnp.arange(start, stop, -1))[0]


def make_sample_fn(apply_fn: Callable, s: Schedule, sigma, shape, clip=None) -> Callable:
    """The sampler: sample_fn(params, rng, first=0) -> float32 [N, H, W, C].

    All T steps are one XLA program, pmapped over this process's devices. Image i
    depends on (params, rng, i) alone, not on N, nor on the number of devices;
    `first` shifts i, so that many images can be made in several calls.

    Args:
      apply_fn: ({"params": params}, x [B, H, W, C], t [B] in 1..T) -> ε̄, a Flax module's `apply`.
      sigma: [T + 1], see `reverse_chain`.
      shape: (N, H, W, C).
      clip: see `reverse_chain`.
    """
    num, *image_shape = shape
    devices = jax.local_devices()[:num]
    per_device = -(-num // len(devices))

    def chain(params, rng, s, sigma, indices):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        x = normal(keys, LATENT, tuple(image_shape))
        return reverse_chain(lambda x, t: apply_fn({"params": params}, x, t), s, sigma, x, keys, clip=clip)

    # The schedule is an argument, not a constant: the program is then the same for every T.
    pmapped = jax.pmap(chain, in_axes=(None, None, None, None, 0), devices=devices)

    def sample_fn(params, rng, first=0):
        indices = first + np.arange(per_device * len(devices)).reshape(len(devices), per_device)
        images = pmapped(params, rng, s, sigma, indices)
        return images.reshape(-1, *image_shape)[:num]

    return sample_fn
