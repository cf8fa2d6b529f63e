"""The train step: a function of (state, images), and what is made of it: several at a time, on all devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from diffusion_jax import from_config
from diffusion_jax.data import order
from diffusion_jax.schedule import Schedule
from diffusion_jax.state import TrainState

AXIS = "batch"  # of the pmapped step
QUARTERS = 4  # of 1..T, for which the loss is reported one by one

# The stream of the seed that training draws from; see also state.py.
_TRAIN = 2**32 - 2


def make_step(
    apply_fn: Callable,
    loss_fn: Callable,
    s: Schedule,
    optimizer: optax.GradientTransformation,
    ema_decay,
    seed: int,
    t_probabilities=None,
    flip: bool = False,
    accumulate: int = 1,
) -> Callable:
    """The step on one device, to be mapped over AXIS: (state, (images, indices)) -> (state, metrics).

    t, noise, dropout and flip of an example are a function of (seed, state.step, its index in
    the global batch) alone, so any number of devices takes the same step.

    Args:
      apply_fn: the UNet's `apply`.
      loss_fn: (output_fn, s, x_0, t, keys [B]) -> [B], output_fn(x, t) the network's output.
      t_probabilities: [T + 1] of the steps t; losses are weighted by 1 / (T p_t), which leaves their
        mean as it is. None: uniform in 1..T.
      flip: turn every second image left to right, at random.
      accumulate: parts that the device's share is cut into, whose gradients are added up one after
        another: less memory, and the same step but for rounding.

    The step's arguments: images uint8 [B, H, W, C] and indices int [B], the device's share of the global
    batch; the state has no device axis (`state.replicate`). Its metrics are the same on all
    devices: loss, grad_norm (before clipping), param_norm, skipped, and loss_t1 ... loss_t4
    over the quarters of 1..T, NaN where the batch has no such t. Where one of the first two
    is not finite, skipped is 1 and the state stays as it was, but for its step.
    """

    def mean_loss(params, x_0, t, noise_keys, dropout_keys):
        def output_fn(x, t):
            return apply_fn({"params": params}, x, t, train=True, dropout_keys=dropout_keys)

        losses = loss_fn(output_fn, s, x_0, t, noise_keys)
        weights = 1.0 if t_probabilities is None else 1 / (s.num_steps * jnp.asarray(t_probabilities, jnp.float32)[t])
        return jnp.mean(weights * losses), losses

    gradient = _accumulated(jax.value_and_grad(mean_loss, has_aux=True), accumulate)

    def step(state, batch):
        pixels, indices = batch
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TRAIN), state.step)
        keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(step_key, index), 4))(indices)
        t = jax.vmap(lambda key: _draw_t(key, s.num_steps, t_probabilities))(keys[:, 0])
        x_0 = (_flipped(pixels, keys[:, 3]) if flip else pixels).astype(jnp.float32) / 127.5 - 1

        (loss, losses), grads = gradient(state.params, x_0, t, keys[:, 1], keys[:, 2])
        loss, grads = lax.pmean((loss, grads), AXIS)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        new = TrainState(state.step + 1, params, ema_params, opt_state)
        # One bad number would stay in Adam's moments and the average for ever: then only the step counts.
        # (Of the new parameters' norm it would take another pass over all of them.)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state._replace(step=new.step))
        metrics = {"loss": loss, "grad_norm": grad_norm, "param_norm": optax.tree.norm(new.params)}
        metrics |= {"skipped": 1.0 - good} | _loss_by_quarter(losses, t, s.num_steps)
        return new, metrics

    return step


def _accumulated(gradient, parts):
    """`gradient` of a mean over examples, of as many parts of them one by one: ((loss, losses), grads)."""
    if parts == 1:
        return gradient

    def of_parts(params, *examples):
        def add(total, part):
            (loss, losses), grads = gradient(params, *part)
            return jax.tree.map(jnp.add, total, (loss, grads)), losses

        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), examples)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, losses = lax.scan(add, zeros, cut)
        loss, grads = jax.tree.map(lambda x: x / parts, total)
        return (loss, losses.reshape(-1)), grads

    return of_parts


def configured_step(config: ConfigDict) -> Callable:
    """`make_step` of what the config says."""
    return make_step(
        from_config.model(config).apply,
        from_config.loss(config),
        from_config.schedule(config),
        from_config.optimizer(config),
        config.train.ema_decay,
        config.seed,
        from_config.t_probabilities(config),
        flip=config.data.flip,
        accumulate=config.train.accumulate,
    )


def several(step: Callable) -> Callable:
    """k steps in one `lax.scan`: (state, (images [k, B, H, W, C], indices [B])) -> (state, metrics [k])."""

    def steps(state, batches):
        pixels, indices = batches
        return _scan(lambda state, pixels: step(state, (pixels, indices)), state, pixels, len(pixels))

    return steps


def resident(step: Callable, k: int, seed: int, batch_size: int) -> Callable:
    """k steps in one `lax.scan`, of a data set on the device: (state, (all images, indices [B])) -> as `several`.

    The images of a step are those that `data.batches` has for it.
    """

    def steps(state, dataset_and_indices):
        dataset, indices = dataset_and_indices

        def one(state, _):
            positions = state.step.astype(jnp.uint32) * jnp.uint32(batch_size) + indices.astype(jnp.uint32)
            return step(state, (dataset[order.shuffled(positions, len(dataset), seed)], indices))

        return _scan(one, state, None, k)

    return steps


def _scan(one, state, xs, length):
    """`lax.scan`, but of one step no loop.

    In loops XLA's gradients of convolutions on the CPU take 12 to 50 times as long, and round otherwise (2e-7).
    """
    if length > 1:
        return lax.scan(one, state, xs, length)
    state, y = one(state, jax.tree.map(lambda x: x[0], xs))
    return state, jax.tree.map(lambda y: y[None], y)


def pmapped(steps: Callable, images_axis: int | None = 0) -> Callable:
    """A step or several, on all devices: images, indices and metrics get a leading axis of the D devices.

    Args:
      images_axis: None: all devices have the same images.

    The memory of the state that it is given is given away.
    """
    in_axes, out_axes = (None, (images_axis, 0)), (None, 0)
    return jax.pmap(steps, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=0)


def _flipped(pixels, keys):
    coins = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(coins[:, None, None, None], pixels[:, :, ::-1], pixels)


def _draw_t(key, num_steps, probabilities):
    if probabilities is None:
        return jax.random.randint(key, (), 1, num_steps + 1)
    below = np.cumsum(probabilities)[1:-1]  # P(t <= 1), …, P(t <= T − 1)
    return 1 + jnp.searchsorted(jnp.asarray(below, jnp.float32), jax.random.uniform(key), side="right")


def _loss_by_quarter(losses, t, num_steps):
    one_hot = jax.nn.one_hot((t - 1) * QUARTERS // num_steps, QUARTERS)
    sums, counts = lax.psum((losses @ one_hot, one_hot.sum(axis=0)), AXIS)
    return {f"loss_t{i + 1}": sums[i] / counts[i] for i in range(QUARTERS)}
