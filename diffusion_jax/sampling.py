"""From noise to data: chains of reverse steps (one `lax.scan` each), grids of steps, and samplers built on them.

Arguments are checked where they are known, not traced: a ValueError or TypeError names the one that is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.typing import ArrayLike

from diffusion_jax import process
from diffusion_jax.process import Network, Prediction
from diffusion_jax.schedule import Schedule, checked, snr, x_0_variance

LATENT = 0  # fold_in(key, LATENT) is the key of x_T; fold_in(key, t) is the key of step t in 1..T


def image_keys(rng: jax.Array, indices: ArrayLike) -> jax.Array:
    """Returns one key for each image: fold_in(rng, i) for i in `indices`, 0 <= i < 2^32. int [n] -> keys [n]."""
    indices = checked("indices", indices, 0, 2**32 - 1, ndim=1)
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)


def image_numbers(first: int, num: int) -> np.ndarray:
    """Returns first .. first + num − 1, uint32 [num]. Raises ValueError if one is outside 0..2^32 − 1."""
    num = checked("num", num, 1, 2**32)
    return np.arange(num, dtype=np.uint32) + np.uint32(checked("first", first, 0, 2**32 - int(num)))


def class_labels(numbers: np.ndarray, num_classes: int, labels: ArrayLike | None = None) -> np.ndarray | None:
    """Returns the label of each image, int32 [n]; None without classes.

    Args:
      numbers: int [n], the numbers of the images. Image i has class i mod num_classes if `labels` is None.
      labels: one int in 0..num_classes, where num_classes is ∅, or one for each image.

    Raises:
      ValueError: a label is out of range, or their number is not n, or there are no classes.
    """
    if labels is None:
        return (numbers % num_classes).astype(np.int32) if num_classes else None
    if not num_classes:
        raise ValueError("labels need a model with classes, and this one has none")
    labels = checked("labels", labels, 0, num_classes, ndim=min(np.ndim(labels), 1))
    if np.shape(labels) not in ((), np.shape(numbers)):
        raise ValueError(f"labels has shape {np.shape(labels)}: give one, or one for each of {len(numbers)} images")
    return np.broadcast_to(labels, numbers.shape).astype(np.int32)


def guided(
    conditional_fn: Network,
    unconditional_fn: Network,
    weight: ArrayLike,
    interval: tuple[int, int] | None = None,
) -> Network:
    """Returns ε̄ = ε̄(x, t, ∅) + w (ε̄(x, t, y) − ε̄(x, t, ∅)), classifier-free guidance (Ho & Salimans 2022).

    Args:
      conditional_fn: (x [B, ...], t [B]) -> ε̄(x, t, y).
      unconditional_fn: (x, t) -> ε̄(x, t, ∅).
      weight: w; 1 is conditional, 0 unconditional. (The paper writes 1 + w.)
      interval: (low, high), the steps t of the guidance, both included; w = 1 outside (Kynkäänniemi et al. 2024).
    """
    low, high = interval or (0, np.inf)

    def eps_bar_fn(x, t):
        w = jnp.where((t >= low) & (t <= high), jnp.asarray(weight, jnp.float32), 1.0).reshape(-1, *[1] * (x.ndim - 1))
        unconditional, conditional = unconditional_fn(x, t), conditional_fn(x, t)
        both = jax.tree.map(lambda of_all, of_y: of_all + w * (of_y - of_all), unconditional, conditional)
        return both._replace(sigma=conditional.sigma) if isinstance(both, Prediction) else both

    return eps_bar_fn


def normal(keys: jax.Array, t: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns the standard normal noise of step t: float32 [B, *shape], example i from fold_in(keys[i], t)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape, jnp.float32))(keys)


class Window(NamedTuple):
    """An observer of a chain, called from inside the chain's program. The samples stay the same, bit for bit.

    After every `every` steps the host runs report(t, look(x_t, x_0)), or report(t) if `look` is None. t is the
    step that the chain has reached and x_0 the prediction that led to x_t. The chain ignores the return value and
    does not wait for the host: call `jax.effects_barrier()` before you read what `report` has collected.

    A window cannot stop a chain. To stop early, cut the chain and decide between the parts: chains
    compose, by `start` and `stop` of `reverse_chain` or by a grid cut in two (`ddim_chain`).

    Attributes:
      report: (t) or (t, what `look` returned), runs on the host.
      every: number of steps from one report to the next, at least 1.
      look: (x_t [B, ...], x_0 [B, ...]) -> a pytree of arrays. It runs on the device.
    """

    report: Callable[..., Any]
    every: int = 1
    look: Callable[[jax.Array, jax.Array], Any] | None = None


def reverse_chain(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: ArrayLike,
    x: jax.Array,
    keys: jax.Array,
    start: int | None = None,
    stop: int = 0,
    clip: tuple[float, float] | None = None,
    window: Window | None = None,
) -> jax.Array:
    """(17) for t = start, ..., stop + 1 in one `lax.scan`: from x_start to x_stop.

    With sigma = 0 this is the greedy chain (16). No noise is added at t = 1 (Ho et al.,
    algorithm 2; Su's code adds σ_1 z there, half a grey level).

    Args:
      eps_bar_fn: (x [B, ...], t [B]) -> ε̄ [B, ...], the network.
      sigma: [T + 1] standard deviation of the noise of each step.
      x: [B, ...] x_start.
      keys: [B] PRNG keys. The noise of example i at step t is drawn from fold_in(keys[i], t)
        alone, so chains compose: T -> k -> 0 equals T -> 0, bit for bit.
      start, stop: Python ints, T >= start >= stop >= 0; start=None is T.
      clip: (lo, hi) bounds the predicted x_0 inside the chain, as Ho et al. do; None, as in Su's code, does not.
      window: observes the chain, see `Window`.

    Returns:
      [B, ...] x_stop.
    """
    start = int(checked("start", s.num_steps if start is None else start, 0, s.num_steps))
    stop = int(checked("stop", stop, 0, start))
    s, sigma = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (s, sigma))

    def step(x, t_u):
        x, x_0 = ancestral_step(eps_bar_fn, s, sigma, x, keys, t_u[0], clip)
        return x, (x, x_0)

    ts = jnp.arange(start, stop, -1, dtype=jnp.int32)
    return _scan(step, x, ts, ts - 1, window)


def ancestral_step(
    eps_bar_fn: Network,
    s: Schedule,
    sigma: jax.Array,
    x: jax.Array,
    keys: jax.Array,
    t: jax.Array,
    clip: tuple[float, float] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(17), one step of `reverse_chain`: from x = x_t [B, ...] to (x_{t−1}, the prediction of x_0).

    Args:
      t: int [] in 1..T.
      eps_bar_fn, sigma, keys, clip: see `reverse_chain`.
    """
    checked("t", t, 1, s.num_steps)
    if jnp.shape(sigma) != s.alpha.shape:
        raise ValueError(f"sigma has shape {jnp.shape(sigma)}: it must be [T + 1], {s.alpha.shape}")
    _check_keys(x, keys)
    (eps_bar, x_0, own), is_of_eps_bar = _predict(eps_bar_fn, s, x, t, clip)
    scale = jnp.where(t > 1, sigma[t], 0.0) if own is None else jnp.where(t > 1, own, 0.0)
    noise = scale * normal(keys, t, x.shape[1:])
    if is_of_eps_bar:
        return process.reverse_step(s, x, t, process.step_noise(s, eps_bar, t), noise), x_0
    return process.posterior_mean(s, x_0, x, t) + noise, x_0


def ddim_chain(
    eps_bar_fn: Network,
    s: Schedule,
    ts: ArrayLike | Sequence[int],
    x: jax.Array,
    keys: jax.Array,
    eta: ArrayLike = 0.0,
    clip: tuple[float, float] | None = None,
    window: Window | None = None,
    mean_square: ArrayLike | None = None,
) -> jax.Array:
    """Song et al. (2021), (12), along a grid of steps in one `lax.scan`: from x_{ts[0]} to x_{ts[-1]}.

    eta = 0 is deterministic. eta = 1 over all steps is the chain with the posterior sigma.
    Chains compose: two parts of a grid, cut at an entry that both parts contain, lead to the same x, bit for bit.

    Args:
      eps_bar_fn: (x [B, ...], t [B]) -> ε̄ [B, ...], the network.
      ts: int [n + 1], falling from at most T to at least 0, see `grid_uniform`. Traced values are not checked, and give
        the same samples, bit for bit, if n >= 2. XLA unrolls one step and may round it differently with constant t.
      x: [B, ...] x_{ts[0]}.
      keys: [B] PRNG keys. The noise of example i at step t is drawn from fold_in(keys[i], t) alone.
      eta: scale of the noise, >= 0. The noise is capped at the whole variance of the step.
      clip: (lo, hi) bounds the predicted x_0. ε̄ is then derived from the bounded x_0
        (improved-diffusion does the same, diffusers does not).
      window: observes the chain, see `Window`.
      mean_square: [T + 1] m_t of `schedule.sigma_analytic`. The noise of a step that does not end at t = 0 then has the
        variance of x_0 given x_t as well, Bao et al. (2022), corollary 1; None leaves it out, as Song et al. do.

    Returns:
      [B, ...] x_{ts[-1]}.
    """
    grid = _checked_grid(s, ts)
    _check_keys(x, keys)
    eta = _checked_eta(eta)
    s = jax.tree.map(jnp.asarray, s)
    of_x_0_given_x = None if mean_square is None else x_0_variance(s, mean_square)

    def step(x, t_u):
        t, u = t_u
        (eps_bar, x_0, _), _ = _predict(eps_bar_fn, s, x, t, clip)
        share = s.beta_bar[u] / s.beta_bar[t]
        deviation = eta * share * jnp.sqrt(process.variance_between(s, t, u))
        deviation = jnp.minimum(deviation, s.beta_bar[u])
        direction = jnp.sqrt((s.beta_bar[u] - deviation) * (s.beta_bar[u] + deviation))
        if mean_square is not None:
            of_x_0 = (s.alpha_bar[u] - direction * s.alpha_bar[t] / s.beta_bar[t]) ** 2 * of_x_0_given_x[t]
            deviation = jnp.where(u > 0, jnp.sqrt(deviation**2 + of_x_0), 0.0)
        x = s.alpha_bar[u] * x_0 + direction * eps_bar + deviation * normal(keys, t, x.shape[1:])
        return x, (x, x_0)

    return _scan(step, x, grid[:-1], grid[1:], window)


def dpmpp_2m_chain(
    eps_bar_fn: Network,
    s: Schedule,
    ts: ArrayLike | Sequence[int],
    x: jax.Array,
    clip: tuple[float, float] | None = None,
    window: Window | None = None,
    keys: jax.Array | None = None,
    eta: ArrayLike = 0.0,
) -> jax.Array:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2, in one `lax.scan`: from x_{ts[0]} to x_{ts[-1]}.

    eta = 0 is deterministic and of second order in λ = log(ᾱ/β̄). eta = 1 is the paper's SDE-DPM-Solver++(2M), and
    others interpolate as k-diffusion does. The first step is of first order, and with eta = 1 that of `ddim_chain`.
    A last step to t = 0, where λ is infinite, is of first order for any number of steps (in other code
    only below 15 steps) and returns the prediction of x_0.

    Args:
      ts: int [n + 1], as in `ddim_chain`; `grid_log_snr` suits this chain best.
      eps_bar_fn, x, clip, window: see `ddim_chain`. A chain cut in two takes one more step of first order.
      keys, eta: keys and scale of the noise, see `ddim_chain`. A known eta = 0 draws none, and needs no keys.

    Returns:
      [B, ...] x_{ts[-1]}.
    """
    grid, eta = _checked_grid(s, ts), _checked_eta(eta)
    if is_random := isinstance(eta, jax.core.Tracer) or bool(eta):
        _check_keys(x, keys)
    s = jax.tree.map(jnp.asarray, s)
    log_snr = jnp.log(s.alpha_bar) - jnp.log(jnp.maximum(s.beta_bar, jnp.finfo(jnp.float32).tiny))

    def step(carry, t_u):
        x, x_0_before, h_before = carry
        t, u = t_u
        (_, x_0, _), _ = _predict(eps_bar_fn, s, x, t, clip)
        h = log_snr[u] - log_snr[t]
        weight = jnp.where((h_before > 0) & (u > 0), 0.5 * h / jnp.where(h_before > 0, h_before, 1.0), 0.0)
        blend = x_0 + weight * (x_0 - x_0_before)
        share = s.beta_bar[u] / s.beta_bar[t]
        if is_random:  # the moments of x_u are right for any forgotten: rounding it changes eta alone
            forgotten = eta * jnp.clip(h, 0.0, 88.0)  # e^−88 is 0 in float32; h may be infinite
            share *= jnp.exp(-forgotten)
        x = share * x + (s.alpha_bar[u] - s.alpha_bar[t] * share) * blend
        if is_random:
            x += s.beta_bar[u] * jnp.sqrt(-jnp.expm1(-2 * forgotten)) * normal(keys, t, x.shape[1:])
        return (x, x_0, h), (x, x_0)

    x, _, _ = _scan(step, (x, jnp.zeros_like(x), jnp.zeros_like(log_snr[0])), grid[:-1], grid[1:], window)
    return x


def _scan(step, carry, ts, us, window):
    """Scans `step`: (carry, (t, u)) -> (carry, (x_u, x_0)) over the steps from t to u. Returns the last carry."""

    def observed(carry, t_u_i):
        t, u, i = t_u_i
        carry, states = step(carry, (t, u))
        if window is not None:
            # Only the call is conditional: XLA would round a step inside a `lax.cond` differently.
            lax.cond(i % window.every == 0, lambda: _report(window, u, states), lambda: None)
        return carry, None

    return lax.scan(observed, carry, (ts, us, jnp.arange(1, len(ts) + 1)))[0]


def _report(window, t, states):
    """Calls `window.report` on the host and drops what it returns."""

    def call(*args):
        window.report(*args)

    io_callback(call, None, t, *() if window.look is None else (window.look(*states),))


def _predict(eps_bar_fn, s, x, t, clip):
    """Returns (Prediction, True if x_0 follows from ε̄) at the scalar step t; ε̄ follows from an x_0 that is clipped."""
    # XLA rounds a constant schedule differently from one that is an argument. The barrier hides the
    # constant, so an exported chain, whose schedule is an argument, gives the same bits.
    s = lax.optimization_barrier(s)
    found = process.prediction(eps_bar_fn(x, jnp.full(x.shape[:1], t)))
    x_0 = process.x_0_of(s, x, t, found)
    if clip is None:
        return found._replace(x_0=x_0), found.x_0 is None
    x_0 = jnp.clip(x_0, *clip)
    return Prediction(process.predict_eps_bar(s, x, t, x_0), x_0, found.sigma), False


def _checked_eta(eta):
    """Returns eta, a Python number unless it is traced. Raises ValueError if it is no scale."""
    if not isinstance(eta, jax.core.Tracer) and not 0 <= (eta := np.asarray(eta).item()) < np.inf:
        raise ValueError(f"eta={eta} must be a number >= 0")
    return eta


def _check_keys(x, keys):
    if np.shape(keys)[:1] != np.shape(x)[:1]:
        raise ValueError(f"keys has shape {np.shape(keys)}: it must hold one key for each of the {len(x)} examples")


def grid_uniform(s: Schedule, n: int) -> np.ndarray:
    """Returns n steps of nearly equal length: int [n + 1] from T to 0."""
    return _distinct(s, np.linspace(s.num_steps, 0, checked("n", n, 1, s.num_steps) + 1))


def grid_quadratic(s: Schedule, n: int) -> np.ndarray:
    """ts = T (1 − i/n)², i = 0..n, Song et al. (2021), appendix D: n steps that shorten towards 0, int [n + 1]."""
    return _distinct(s, s.num_steps * np.linspace(1, 0, checked("n", n, 1, s.num_steps) + 1) ** 2)


def grid_log_snr(s: Schedule, n: int) -> np.ndarray:
    """Returns n − 1 steps from T to 1, nearly equal in λ = log(ᾱ/β̄), and the step from 1 to 0: int [n + 1]."""
    n = checked("n", n, 1, s.num_steps)
    alpha_bar, beta_bar = (np.asarray(x, np.float64)[1:] for x in (s.alpha_bar, s.beta_bar))
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, 0.1 * alpha_bar[-2:][0])  # of a zero at T the logarithm is infinite
    log_snr = np.log(alpha_bar / beta_bar)  # falls with t
    targets = np.linspace(log_snr[-1], log_snr[0], n)
    ts = np.interp(-targets, -log_snr, np.arange(1, s.num_steps + 1))
    return _distinct(s, np.append(ts, 0))


def grid_by_bound(s: Schedule, squared_error: ArrayLike, n: int) -> np.ndarray:
    """Returns the n steps of the best bound, int [n + 1] from T to 0: Watson et al. (2021), by dynamic programming.

    `squared_error` [T + 1] and the bound are those of `step_costs`.
    """
    n, cost = checked("n", n, 1, s.num_steps), step_costs(s, squared_error)
    total, before = np.append(np.full(s.num_steps, np.inf), 0.0), []
    for _ in range(n):
        before.append((total[:, None] + cost).argmin(axis=0))
        total = (total[:, None] + cost).min(axis=0)
    ts = [0]
    for best in reversed(before):
        ts.append(int(best[ts[-1]]))
    return np.array(ts[::-1], np.int32)


def step_costs(s: Schedule, squared_error: ArrayLike) -> np.ndarray:
    """Returns the nats that a step from t to u costs in the bound, float64 [t, u]; inf where there is none.

    A step from t to u costs ½ (SNR_u − SNR_t) e_t nats, the KL of `likelihood.step_kl` with the posterior's deviation.
    The step to 0 costs what a Gaussian of the best deviation needs for x_0 to half a grey level.

    Args:
      squared_error: [T + 1] e_t = E‖x_0 − x̂_0(x_t)‖² > 0, a mean over entries; entry 0 is not used.
    """
    error = np.asarray(squared_error, np.float64)
    if error.shape != s.beta.shape or not (error[1:] > 0).all():
        raise ValueError(f"squared_error has shape {error.shape}: it must be [T + 1], {s.beta.shape}, of numbers > 0")
    ratio = np.asarray(snr(s), np.float64)[1:]
    cost = np.full((s.num_steps + 1, s.num_steps + 1), np.inf)  # [t, u]
    t, u = np.tril_indices(s.num_steps, -1)
    cost[t + 1, u + 1] = 0.5 * (ratio[u] - ratio[t]) * error[t + 1]
    cost[1:, 0] = np.maximum(0.5 * np.log(2 * np.pi * np.e * error[1:]) + np.log(127.5), 0)
    return cost


def _distinct(s, ts):
    """Returns ts [n + 1] rounded to distinct steps that fall from T to 0."""
    n, ts = len(ts) - 1, np.rint(ts).astype(np.int32)
    for i in range(n - 1, -1, -1):
        ts[i] = max(ts[i], ts[i + 1] + 1)
    return np.minimum(ts, s.num_steps - np.arange(n + 1))


def _checked_grid(s, ts):
    """Returns ts as int32 [n + 1]. Raises ValueError unless it is a falling grid; traced values are not checked."""
    ts = checked("ts", ts, 0, s.num_steps, ndim=1)
    if len(ts) < 2 or (isinstance(ts, np.ndarray) and (np.diff(ts.astype(np.int64)) >= 0).any()):
        raise ValueError(f"ts={ts} must fall from at most T={s.num_steps} to at least 0, in at least one step")
    return jnp.asarray(ts, jnp.int32)


def make_indexed_sample_fn(
    apply_fn: Callable[..., jax.Array],
    s: Schedule,
    sigma: ArrayLike,
    image_shape: Sequence[int],
    clip: tuple[float, float] | None = None,
    chain: Callable[..., jax.Array] | None = None,
    window: Window | None = None,
) -> Callable[..., jax.Array]:
    """Returns a sampler for one device: sample(params, rng, indices [n], …) -> float32 [n, H, W, C].

    It takes any n. Image i depends on (params, rng, i, its label) alone. The other arguments are s=s, sigma=sigma and
    labels=None, int [n] for a network with classes, which apply_fn then takes as its last argument.

    Args:
      image_shape: (H, W, C).
      apply_fn, s, sigma, clip, chain, window: see `make_sample_fn`.
    """
    chain = chain or reverse_chain

    def sample(params, rng, indices, s=s, sigma=sigma, labels=None):
        keys = image_keys(rng, indices)
        x = normal(keys, LATENT, tuple(image_shape))
        of = () if labels is None else (labels,)
        return chain(lambda x, t: apply_fn({"params": params}, x, t, *of), s, sigma, x, keys, clip=clip, window=window)

    return sample


def make_sample_fn(
    apply_fn: Callable[..., jax.Array],
    s: Schedule,
    sigma: ArrayLike,
    shape: Sequence[int],
    clip: tuple[float, float] | None = None,
    chain: Callable[..., jax.Array] | None = None,
    window: Window | None = None,
    num_classes: int = 0,
) -> Callable[..., jax.Array]:
    """Returns the sampler of this process: sample_fn(params, rng, first=0, labels=None) -> float32 [N, H, W, C].

    All T steps are one XLA program, pmapped over the local devices. Image i depends on
    (params, rng, i, its label) alone, not on N or the number of devices. A call returns images first .. first + N − 1,
    so a large set can be made in several calls. `sample_fn.lower(params, rng)` is the program, as of a jitted function.

    Args:
      apply_fn: ({"params": params}, x [B, H, W, C], t [B] in 1..T) -> ε̄, a Flax module's `apply`.
      sigma: [T + 1], see `reverse_chain`.
      shape: (N, H, W, C).
      clip: see `reverse_chain`.
      chain: (eps_bar_fn, s, sigma, x_T, keys, clip=clip, window=window) -> x_0; None is `reverse_chain`.
      window: observes the chain of each device, see `Window`.
      num_classes: the number of classes, of which `labels` chooses: one int, or one for each image; image i has class
        i mod num_classes if it is None, and class num_classes is ∅. apply_fn takes them as its last argument, [B].
    """
    num, *image_shape = checked("shape", shape, 1, 2**32, ndim=1).tolist()
    devices = jax.local_devices()[:num]
    per_device = -(-num // len(devices))
    sample = make_indexed_sample_fn(apply_fn, s, sigma, image_shape, clip, chain, window)
    # The schedule is an argument, not a constant, so the program is the same for every T.
    pmapped = jax.pmap(sample, in_axes=(None, None, 0, None, None, 0), devices=devices)

    def arguments(params, rng, first=0, labels=None):
        numbers, split = image_numbers(first, num), (len(devices), per_device)
        labels = class_labels(numbers, num_classes, labels)
        labels = None if labels is None else np.resize(labels, split)
        return params, rng, np.resize(numbers, split), s, sigma, labels  # the rest repeats and is cut off

    def sample_fn(params, rng, first=0, labels=None):
        return pmapped(*arguments(params, rng, first, labels)).reshape(-1, *image_shape)[:num]

    sample_fn.lower = lambda *args: pmapped.lower(*arguments(*args))  # type: ignore[attr-defined]
    return sample_fn
