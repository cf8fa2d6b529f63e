"""Edits of real images: RePaint, SDEdit, and DDIM inversion.

Every function takes and returns arrays. `eps_bar_fn`, `s`, `sigma`, `keys` and `clip` are those of
`sampling.reverse_chain`; `eps_bar_fn` may be any function (x [B, ...], t [B]) -> [B, ...], a guided network too.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from diffusion_jax import process, sampling
from diffusion_jax.process import Network
from diffusion_jax.schedule import MOST_STEPS, Schedule, checked


def repaint_times(num_steps: int, jump: int, repeats: int) -> np.ndarray:
    """Returns the steps that RePaint visits, Lugmayr et al. (2022): int [n + 1] from T to 0.

    Each entry is 1 below or 1 above the entry before. The chain goes down. At the steps 1, 1 + jump,
    1 + 2 jump, … up to T − jump it goes up `jump` steps and down again, `repeats` − 1 times. jump = 1 is their
    algorithm 1. Step 1 and the up to `jump` − 1 steps above the last jump are done once, the others `repeats` times.

    Args:
      jump: in 1..max(1, T − 1).
      repeats: >= 1. 1 is the plain chain.
    """
    num_steps = int(checked("num_steps", num_steps, 1, MOST_STEPS))
    jump = int(checked("jump", jump, 1, max(1, num_steps - 1)))
    repeats = int(checked("repeats", repeats, 1, MOST_STEPS))
    times = [num_steps]
    for t in range(num_steps - 1, -1, -1):
        times.append(t)
        if 1 <= t <= num_steps - jump and (t - 1) % jump == 0:
            times += [*range(t + 1, t + jump), *range(t + jump, t - 1, -1)] * (repeats - 1)
    return np.array(times, np.int32)


def repaint(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: ArrayLike,
    known: ArrayLike,
    x: ArrayLike,
    keys: jax.Array,
    clip: tuple[float, float] | None = None,
    jump: int = 10,
    repeats: int = 10,
) -> jax.Array:
    """Fills in unknown pixels by the chain of `repaint_times`, Lugmayr et al. (2022), algorithm 1.

    Before each reverse step t, ᾱ_t x_0 + β̄_t ε̄ replaces the known pixels of x_t, by (6). In a single chain the
    unknown pixels take shape beside known ones that are mostly noise. RePaint goes back up `jump` steps, by
    q(x_t | x_{t−jump}) in one draw, and down again, so that both parts can agree. All reverse steps, about
    `repeats` · T, are one `lax.scan`.

    Visit r = 0, 1, … of step t draws from (keys[i], t, r) alone: ε̄ from fold_in(k, T + t), the noise of the reverse
    step from fold_in(k, t) and the noise of the way up to t from fold_in(k, 2T + t). k is keys[i] for r = 0 and
    fold_in(keys[i], 2T + r) for r > 0.

    Args:
      x_0: [B, ...] the images. The values of unknown pixels are not used.
      known: bool, broadcasts to [B, ...].
      x: [B, ...] x_T.
      jump, repeats: see `repaint_times`. A large `jump` moves an image further; `repeats` costs its factor in time.

    Returns:
      [B, ...], equal to x_0 at known pixels, bit for bit.
    """
    num_steps, steps = s.num_steps, _reverse_steps(repaint_times(s.num_steps, jump, repeats))
    s, sigma = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (s, sigma))

    def step(x, t_u_r):
        (t, u, r), own = t_u_r, keys
        if repeats > 1:  # without these lines one repeat is the program of a plain chain, and has its bits
            own = jnp.where(r > 0, jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * num_steps + r), keys)
            noise = sampling.normal(own, 2 * num_steps + t, x.shape[1:])
            up = s.alpha_bar[t] / s.alpha_bar[u] * x + jnp.sqrt(process.variance_between(s, t, u)) * noise
            x = jnp.where(u < t, up, x)
        x = jnp.where(known, process.forward(s, x_0, t, sampling.normal(own, num_steps + t, x.shape[1:])), x)
        return sampling.ancestral_step(eps_bar_fn, s, sigma, x, own, t, clip)[0], None

    x, _ = lax.scan(step, x, steps)
    return jnp.where(known, x_0, x)


def _reverse_steps(times):
    """Returns (t, u, visit) of the reverse steps, int32 [n] each. The chain goes up from u to t before it, if u < t."""
    down = times[1:] < times[:-1]
    ts, reached = times[:-1][down], times[1:][down]
    counts = collections.Counter()
    visits = []
    for t in ts.tolist():
        visits.append(counts[t])
        counts[t] += 1
    return jnp.asarray(ts), jnp.asarray(np.append(times[:1], reached[:-1])), jnp.asarray(visits, jnp.int32)


def boundary_error(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the mean absolute difference of neighbouring pixels across the edge of a mask: float64 [B].

    Real images have a boundary error too. A visible seam exceeds it.

    Args:
      images: [B, H, W, C].
      known: bool, broadcasts to [B, H, W, 1]. A pair of neighbours counts if one of them is known.

    Returns:
      [B], in the units of the images; NaN where the mask has no edge.
    """
    known = np.broadcast_to(known, (*images.shape[:3], 1))
    total, count = np.zeros(len(images)), np.zeros(len(images), int)
    for axis in (1, 2):
        across = np.diff(known, axis=axis)  # of booleans: True where they differ
        total += np.sum(across * abs(np.diff(np.asarray(images, np.float64), axis=axis)), axis=(1, 2, 3))
        count += np.sum(across, axis=(1, 2, 3)) * images.shape[3]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def sdedit(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x_0: jax.Array,
    keys: jax.Array,
    t: int,
    clip: tuple[float, float] | None = None,
) -> jax.Array:
    """Returns variations of images: a chain from x_t, the noised image (6), to x_0. Meng et al. (2022), SDEdit.

    A small t returns nearly the image. t = T returns samples that share nothing with it, if ᾱ_T is about 0.

    Args:
      x_0: [B, ...] the images; one image broadcast to [B, ...] gives B variations of it.
      keys: [B]. ε̄ of example i is the latent of keys[i].
      t: in 0..T.
    """
    x_t = process.forward(s, x_0, t, sampling.normal(keys, sampling.LATENT, jnp.shape(x_0)[1:]))
    return sampling.reverse_chain(eps_bar_fn, s, sigma, x_t, keys, start=t, clip=clip)


def invert(eps_bar_fn: Network, s: Schedule, ts: ArrayLike | Sequence[int], x: jax.Array) -> jax.Array:
    """DDIM inversion, Song et al. (2021), section 4.3: `ddim_chain` with eta = 0 upwards, from x_{ts[-1]} to x_{ts[0]}.

    A step from u to t takes ε̄ at x_u, where `ddim_chain` takes it at x_t. So `ddim_chain` over the same grid
    returns x with an error that falls as 1/n, if that chain has no clip: a clipped step has no inverse.

    Args:
      ts: int [n + 1], the falling grid of `ddim_chain`. At u = 0 the network is asked for t = 1.
      x: [B, ...] x_{ts[-1]}, the images if ts ends at 0.

    Returns:
      [B, ...] x_{ts[0]}, the latents.
    """
    ts = checked("ts", ts, 0, s.num_steps, ndim=1)
    if isinstance(ts, np.ndarray) and (len(ts) < 2 or (np.diff(ts.astype(np.int64)) >= 0).any()):
        raise ValueError(f"ts={ts} must fall, in at least one step")
    s = jax.tree.map(jnp.asarray, s)

    def step(x, u_t):
        u, t = u_t
        eps_bar = process.prediction(eps_bar_fn(x, jnp.full(x.shape[:1], jnp.maximum(u, 1)))).eps_bar
        return process.forward(s, process.predict_x_0(s, x, u, eps_bar), t, eps_bar), None

    grid = jnp.asarray(ts, jnp.int32)[::-1]
    return lax.scan(step, jnp.asarray(x), (grid[:-1], grid[1:]))[0]
