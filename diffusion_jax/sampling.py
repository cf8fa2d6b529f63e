"""From noise to data: the reverse chain as one `lax.scan`, and `sample_fn` around it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from diffusion_jax import process
from diffusion_jax.schedule import Schedule

LATENT = 0  # what fold_in(key, LATENT) draws is x_T; step t of the chain, 1..T, draws from fold_in(key, t)


def normal(keys, t, shape):
    """Standard normal noise of step t, example i from fold_in(keys[i], t): [B, *shape] float32."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


class Window(NamedTuple):
    """A look into a chain while it runs, from inside its one program; the samples stay the same, bit for bit.

    After every `every` steps the host is called: report(t, look(x_t, x_0)), t the step that is
    reached and x_0 the prediction that led there; report(t) if look is None. If it returns
    something true, the chain stops and what it has reached is its result.
    """

    report: Callable
    every: int = 1
    look: Callable | None = None


def reverse_chain(eps_bar_fn, s: Schedule, sigma, x, keys, start=None, stop=0, clip=None, window=None):
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
      window: a `Window`, or None.

    Returns:
      [B, ...] x_stop; with a window, (x_t, t), where t > stop if it has stopped the chain:
      start=t goes on, bit for bit.

    Raises:
      ValueError: start or stop out of range.
    """
    start = s.num_steps if start is None else start
    if not s.num_steps >= start >= stop >= 0:
        raise ValueError(f"need T >= start >= stop >= 0, not T={s.num_steps}, start={start}, stop={stop}")

    s, sigma = jax.tree.map(jnp.asarray, (s, sigma))

    def step(x, t_u):
        x, x_0 = ancestral_step(eps_bar_fn, s, sigma, x, keys, t_u[0], clip)
        return x, (x, x_0)

    ts = jnp.arange(start, stop, -1)
    return _scan(step, x, ts, ts - 1, start, window)


def ancestral_step(eps_bar_fn, s: Schedule, sigma, x, keys, t, clip=None):
    """(17): x_{t−1} from x_t, and the prediction of x_0 on the way. Arguments of `reverse_chain`; t int []."""
    x_0, eps_bar = _predict(eps_bar_fn, s, x, t, clip)
    noise = jnp.where(t > 1, sigma[t], 0.0) * normal(keys, t, x.shape[1:])
    if clip is None:
        return process.reverse_step(s, x, t, process.step_noise(s, eps_bar, t), noise), x_0
    return process.posterior_mean(s, x_0, x, t) + noise, x_0


def ddim_chain(eps_bar_fn, s: Schedule, ts, x, keys, eta=0.0, clip=None, window=None):
    """Song et al. (2021), (12), along the steps of a grid, in one `lax.scan`: from x_{ts[0]} to x_{ts[-1]}.

    eta = 0 is deterministic; eta = 1 over all steps is the chain with the posterior sigma.
    Chains compose: a grid cut in two, at an entry that both parts hold, leads to the same.

    Args:
      eps_bar_fn: (x [B, ...], t [B]) -> ε̄ [B, ...].
      ts: int [n + 1], descending, from at most T to at least 0: see `grid_uniform`.
      x: [B, ...] x_{ts[0]}.
      keys: [B]; the noise of example i at step t is drawn from fold_in(keys[i], t) alone.
      eta: scale of the noise, any number >= 0; where it asks for more than the whole variance
        it gets that.
      clip: (lo, hi) bounds the prediction of x_0, from which ε̄ is then derived again
        (improved-diffusion does so, diffusers does not).
      window: as of `reverse_chain`; the rest of the grid goes on.

    Returns:
      [B, ...] x_{ts[-1]}; with a window, (x_t, t).

    Raises:
      ValueError: ts is no such grid.
    """
    ts = _check_grid(s, ts)
    s = jax.tree.map(jnp.asarray, s)

    def step(x, t_u):
        t, u = t_u
        x_0, eps_bar = _predict(eps_bar_fn, s, x, t, clip)
        share = s.beta_bar[u] / s.beta_bar[t]
        deviation = eta * share * jnp.sqrt(process.variance_between(s, t, u))
        deviation = jnp.minimum(deviation, s.beta_bar[u])
        direction = jnp.sqrt((s.beta_bar[u] - deviation) * (s.beta_bar[u] + deviation))
        x = s.alpha_bar[u] * x_0 + direction * eps_bar + deviation * normal(keys, t, x.shape[1:])
        return x, (x, x_0)

    return _scan(step, x, ts[:-1], ts[1:], ts[0], window)


def dpmpp_2m_chain(eps_bar_fn, s: Schedule, ts, x, clip=None, window=None):
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2, in one `lax.scan`: from x_{ts[0]} to x_{ts[-1]}.

    Deterministic, of second order in λ = log(ᾱ/β̄). The first step is of first order, and so is
    a last step to t = 0, where λ is infinite: it returns the prediction of x_0. That covers the lower order
    at the end which others switch on for fewer than 15 steps: here it is so for any number.

    Args:
      eps_bar_fn, x, clip, window: as of `ddim_chain`; a chain that is cut has one more step of
        first order.
      ts: int [n + 1], descending; best `grid_log_snr`.

    Raises:
      ValueError: ts is no such grid.
    """
    ts = _check_grid(s, ts)
    s = jax.tree.map(jnp.asarray, s)
    log_snr = jnp.log(s.alpha_bar) - jnp.log(jnp.maximum(s.beta_bar, jnp.finfo(jnp.float32).tiny))

    def step(carry, t_u):
        x, x_0_before, h_before = carry
        t, u = t_u
        x_0, _ = _predict(eps_bar_fn, s, x, t, clip)
        h = log_snr[u] - log_snr[t]
        weight = jnp.where((h_before > 0) & (u > 0), 0.5 * h / jnp.where(h_before > 0, h_before, 1.0), 0.0)
        blend = x_0 + weight * (x_0 - x_0_before)
        share = s.beta_bar[u] / s.beta_bar[t]
        x = share * x + (s.alpha_bar[u] - s.alpha_bar[t] * share) * blend
        return (x, x_0, h), (x, x_0)

    result = _scan(step, (x, jnp.zeros_like(x), jnp.zeros(())), ts[:-1], ts[1:], ts[0], window)
    return result[0] if window is None else (result[0][0], result[1])


def _scan(step, carry, ts, us, start, window):
    """`step` along the pairs (t, u) of steps: the last carry, with a window also the step that is reached."""
    if window is None:
        return lax.scan(lambda carry, t_u: (step(carry, t_u)[0], None), carry, (ts, us))[0]

    def call(u, x, x_0):
        looked = () if window.look is None else (window.look(x, x_0),)
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        return io_callback(lambda *args: np.bool_(bool(window.report(*args))), flag, u, *looked)

    # Not a scan whose steps are skipped after a stop: a step within a `lax.cond` is rounded otherwise.
    def go(state):
        i, carry, _, _ = state
        carry, (x, x_0) = step(carry, (ts[i], us[i]))
        due = (i + 1) % window.every == 0
        stopped = lax.cond(due, lambda: call(us[i], x, x_0), lambda: jnp.zeros((), jnp.bool_))
        return i + 1, carry, us[i], stopped

    def goes_on(state):
        i, _, _, stopped = state
        return (i < len(ts)) & ~stopped

    first = (jnp.zeros((), jnp.int32), carry, jnp.asarray(start, us.dtype), jnp.zeros((), jnp.bool_))
    _, carry, reached, _ = lax.while_loop(goes_on, go, first)
    return carry, reached


def _predict(eps_bar_fn, s, x, t, clip):
    """(x_0, ε̄) that the network predicts at the scalar step t; ε̄ is that of the clipped x_0."""
    # XLA rounds differently where it can see that the schedule is constant. Behind the barrier it
    # cannot, so that an exported chain, in which it never is, gives the same bits.
    s = lax.optimization_barrier(s)
    eps_bar = eps_bar_fn(x, jnp.full(x.shape[:1], t))
    x_0 = process.predict_x_0(s, x, t, eps_bar)
    if clip is None:
        return x_0, eps_bar
    x_0 = jnp.clip(x_0, *clip)
    return x_0, process.predict_eps_bar(s, x, t, x_0)


def grid_uniform(s: Schedule, n: int) -> np.ndarray:
    """n steps of about equal length: int [n + 1] from T to 0. ValueError unless 1 <= n <= T."""
    return _grid(s, n, np.linspace(s.num_steps, 0, _at_least_1(n) + 1))


def grid_quadratic(s: Schedule, n: int) -> np.ndarray:
    """n steps that shorten towards 0, ts = T (1 − i/n)², Song et al. (2021), appendix D. int [n + 1]."""
    return _grid(s, n, s.num_steps * np.linspace(1, 0, _at_least_1(n) + 1) ** 2)


def grid_log_snr(s: Schedule, n: int) -> np.ndarray:
    """n steps, all but the last about equal in λ = log(ᾱ/β̄): int [n + 1] from T by way of 1 to 0."""
    alpha_bar, beta_bar = (np.asarray(x, np.float64)[1:] for x in (s.alpha_bar, s.beta_bar))
    log_snr = np.log(alpha_bar / beta_bar)  # falls with t
    wanted = np.linspace(log_snr[-1], log_snr[0], _at_least_1(n))
    ts = np.interp(-wanted, -log_snr, np.arange(1, s.num_steps + 1))
    return _grid(s, n, np.append(ts, 0))


def _at_least_1(n):
    if n < 1:
        raise ValueError(f"a grid needs at least 1 step, not {n}")
    return n


def _grid(s, n, ts):
    """Rounds to whole steps that differ, T and 0 at the ends."""
    if n > s.num_steps:
        raise ValueError(f"a grid of {n} steps needs T >= {n}, not T={s.num_steps}")
    ts = np.rint(ts).astype(np.int32)
    for i in range(n - 1, -1, -1):
        ts[i] = max(ts[i], ts[i + 1] + 1)
    return np.minimum(ts, s.num_steps - np.arange(n + 1))


def _check_grid(s, ts):
    ts = np.asarray(ts)
    if ts.ndim != 1 or len(ts) < 2 or (np.diff(ts) >= 0).any() or ts[0] > s.num_steps or ts[-1] < 0:
        raise ValueError(f"ts must fall from at most T={s.num_steps} to at least 0, not {ts}")
    return jnp.asarray(ts, jnp.int32)


def image_keys(rng, indices):
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)


def make_indexed_sample_fn(
    apply_fn: Callable, s: Schedule, sigma, image_shape, clip=None, chain: Callable | None = None, window=None
) -> Callable:
    """sample(params, rng, indices [n], s=s, sigma=sigma) -> float32 [n, H, W, C]: images `indices` on one device.

    Image i depends on (params, rng, i) alone. Arguments as of `make_sample_fn`.
    """
    chain = chain or reverse_chain

    def sample(params, rng, indices, s=s, sigma=sigma):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
        x = normal(keys, LATENT, tuple(image_shape))
        x = chain(lambda x, t: apply_fn({"params": params}, x, t), s, sigma, x, keys, clip=clip, window=window)
        return x if window is None else x[0]

    return sample


def make_sample_fn(
    apply_fn: Callable,
    s: Schedule,
    sigma,
    shape,
    clip=None,
    chain: Callable | None = None,
    window: Window | None = None,
) -> Callable:
    """The sampler: sample_fn(params, rng, first=0) -> float32 [N, H, W, C].

    All T steps are one XLA program, pmapped over this process's devices. Image i
    depends on (params, rng, i) alone, not on N, nor on the number of devices;
    `first` shifts i, so that many images can be made in several calls.

    Args:
      apply_fn: ({"params": params}, x [B, H, W, C], t [B] in 1..T) -> ε̄, a Flax module's `apply`.
      sigma: [T + 1], see `reverse_chain`.
      shape: (N, H, W, C).
      clip: see `reverse_chain`.
      chain: (eps_bar_fn, s, sigma, x_T, keys, clip=clip, window=window) -> as `reverse_chain`; default `reverse_chain`.
      window: handed to the chain; it reports once for each device, and is not to stop the chain.
    """
    num, *image_shape = shape
    devices = jax.local_devices()[:num]
    per_device = -(-num // len(devices))
    sample = make_indexed_sample_fn(apply_fn, s, sigma, image_shape, clip, chain, window)
    # The schedule is an argument, not a constant: the program is then the same for every T.
    pmapped = jax.pmap(sample, in_axes=(None, None, 0, None, None), devices=devices)

    def sample_fn(params, rng, first=0):
        indices = first + np.arange(per_device * len(devices)).reshape(len(devices), per_device)
        images = pmapped(params, rng, indices, s, sigma)
        return images.reshape(-1, *image_shape)[:num]

    return sample_fn
