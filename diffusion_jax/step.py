"""The train step of Ho et al. (2020), a function of (state, batch); `running.dispatch` takes it on all devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from diffusion_jax.data import pixels
from diffusion_jax.running import averages, gradients
from diffusion_jax.schedule import Schedule
from diffusion_jax.unet import UNet

AXIS = "batch"  # the axis of the pmapped step
QUARTERS = 4  # the loss is also reported for each quarter of 1..T

# Training and the initial weights fold these into the seed. They are far from the small image numbers
# that sampling folds into it.
_TRAIN = 2**32 - 2
_INIT = 2**32 - 1
_LABEL = 4  # folded into the key of an example, whose first four parts are t, noise, dropout and flip
_init_network = jax.jit(UNet.init, static_argnums=0)  # keeps its trace, which takes 0.1 to 0.3 s


class TrainState(NamedTuple):
    """The state of a run. The random streams and the position in the data are functions of `step`."""

    step: Any  # int32 [], optimiser steps done
    params: Any
    ema_params: Any
    opt_state: Any
    averages: Any = None  # a tuple of pytrees, one for each power-function average, see `running.averages`


def init_state(
    model: UNet, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> TrainState:
    """Returns the state before the first step as NumPy arrays, without averages; it depends on the seed alone."""
    # On the CPU LLVM's passes take most of the compile time, for a program that runs once.
    quick: dict[str, str | bool] = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else {}
    program = jax.jit(lambda: _init(model, optimizer, image_shape, seed)).lower().compile(compiler_options=quick)
    params, opt_state = jax.device_get(program())
    # Copies: the step donates its state, and one array cannot be donated twice.
    return TrainState(np.zeros((), np.int32), params, jax.tree.map(np.copy, params), opt_state)


def abstract_state(
    model: UNet, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], num_averages: int = 0
) -> TrainState:
    """Returns the shapes and dtypes of a state without its arrays."""
    params, opt_state = jax.eval_shape(lambda: _init(model, optimizer, image_shape, 0))
    return TrainState(jax.ShapeDtypeStruct((), np.int32), params, params, opt_state, (params,) * num_averages or None)


def _init(model, optimizer, image_shape, seed):
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    params = _init_network(model, key, jnp.zeros((1, *image_shape), jnp.float32), jnp.ones(1, jnp.int32))["params"]
    return params, optimizer.init(params)


def make_step(
    apply_fn: Callable,
    loss_fn: Callable,
    s: Schedule,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    t_probabilities: np.ndarray | None = None,
    flip: bool = False,
    accumulate: int = 1,
    deterministic: bool = False,
    ema_warmup: bool = False,
    learning_rate: optax.Schedule = lambda step: 0.0,
    num_classes: int = 0,
    label_dropout: float = 0.0,
    weight: ArrayLike | None = None,
    power_exponents: Sequence[float] = (),
) -> Callable:
    """Returns the step of one device, to be mapped over AXIS: (state, (batch, indices)) -> (state, metrics).

    An example's t, noise, dropout and flip depend on (seed, state.step, its index in the global batch)
    alone, so any number of devices takes the same step.

    Args:
      apply_fn: the UNet's `apply`.
      loss_fn: (output_fn, s, x_0, t, keys [B]) -> [B], where output_fn(x, t) is the network's output.
      t_probabilities: [T + 1] probability of each t; losses are weighted by 1 / (T p_t), which preserves
        their mean. None means uniform in 1..T.
      flip: True mirrors each image left to right, along its last axis before the channels, with probability 1/2.
      accumulate: number of parts of the device's batch. Their gradients are summed one after another, which
        saves memory and changes the step by rounding alone.
      deterministic: True cuts the global batch into `accumulate` parts, a power of two that the number of devices
        divides, and adds their gradients in an order that does not depend on that number.
      ema_warmup: True lowers the decay of the average to (1 + n)/(10 + n) after n steps, while that is less.
      learning_rate: step -> rate, for the metrics alone.
      num_classes: 0, or the number of classes; batches then have a label [B], which the network takes.
      label_dropout: the probability that a label becomes num_classes, ∅.
      weight: [T + 1], the weight of a loss in the gradient by its t. The metrics tell the loss without it, and the mean
        with it as weighted_loss. None is 1.
      power_exponents: of state.averages, see `averages.updated`. A skipped step counts in n, but is not averaged.

    The step takes a batch {"image": uint8 [B, H, W, C], …}, or float32 in [−1, 1], and indices int [B], the device's
    share of the global batch; the state has no device axis (see `replicate`). Its metrics are the same on all devices:
    loss, grad_norm (before clipping), param_norm, learning_rate, skipped, and loss_t1 … loss_t4 over the quarters of
    1..T (NaN: the batch has none). If loss or gradient is not finite, skipped is 1 and only state.step changes.
    """

    def mean_loss(params, batch, t, noise_keys, dropout_keys):
        labels = {"labels": batch["label"]} if num_classes else {}

        def output_fn(x, t):
            return apply_fn({"params": params}, x, t, train=True, dropout_keys=dropout_keys, **labels)

        with jax.named_scope("loss"):
            losses = loss_fn(output_fn, s, batch["image"], t, noise_keys)
        rarity = 1.0 if t_probabilities is None else 1 / (s.num_steps * jnp.asarray(t_probabilities, jnp.float32)[t])
        loss = jnp.mean(rarity * losses)
        weighted = loss if weight is None else jnp.mean(rarity * jnp.asarray(weight, jnp.float32)[t] * losses)
        return weighted, (loss, _by_quarter(losses, t, s.num_steps))

    mean = gradients.mean_in_fixed_order if deterministic else gradients.mean
    gradient = mean(jax.value_and_grad(mean_loss, has_aux=True), accumulate, AXIS)

    def step(state, batch_and_indices):
        batch, indices = batch_and_indices
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TRAIN), state.step)
        example_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, indices)
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(example_keys)
        t = jax.vmap(lambda key: _draw_t(key, s.num_steps, t_probabilities))(keys[:, 0])
        image = _flipped(batch["image"], keys[:, 3]) if flip else batch["image"]
        batch = batch | {"image": pixels.from_uint8(image)}
        if num_classes:
            batch["label"] = _dropped(batch["label"], example_keys, num_classes, label_dropout)
        (weighted, (loss, (sums, counts))), grads = gradient(state.params, indices, batch, t, keys[:, 1], keys[:, 2])
        grads = gradients.row_major(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("average"):
            warm = jnp.maximum(1 - ema_decay, 9 / (10 + state.step.astype(jnp.float32)))
            ema_params = optax.incremental_update(params, state.ema_params, warm if ema_warmup else 1 - ema_decay)
            powers = state.averages and averages.updated(state.averages, params, state.step + 1, power_exponents)
        new = TrainState(state.step + 1, params, ema_params, opt_state, powers)
        # A non-finite number would stay in Adam's moments and in the EMA for ever, so only the step advances.
        grad_norm = gradients.norm(grads)
        is_finite = jnp.isfinite(weighted) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda new, old: jax.lax.select(is_finite, new, old), new, state._replace(step=new.step))
        metrics = {"loss": loss, "grad_norm": grad_norm, "param_norm": gradients.norm(new.params)}
        metrics |= {"learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32)}
        metrics |= {} if weight is None else {"weighted_loss": weighted}
        metrics |= {"skipped": 1.0 - is_finite} | {f"loss_t{i + 1}": sums[i] / counts[i] for i in range(QUARTERS)}
        return new, metrics

    return step


def _flipped(image, keys):
    coins = jax.vmap(jax.random.bernoulli, (0, None))(keys, np.float32(0.5))
    return jnp.where(jnp.expand_dims(coins, tuple(range(1, image.ndim))), image[..., ::-1, :], image)


def _dropped(labels, keys, num_classes, rate):
    """Returns the labels, each of which is ∅ with the probability `rate`."""
    coins = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _LABEL), (), jnp.float32) < rate)(keys)
    return jnp.where(coins, num_classes, labels)


def _draw_t(key, num_steps, probabilities):
    if probabilities is None:
        return jax.random.randint(key, (), 1, num_steps + 1, jnp.int32)
    below = np.cumsum(probabilities)[1:-1]  # P(t <= 1), …, P(t <= T − 1)
    return 1 + jnp.searchsorted(jnp.asarray(below, jnp.float32), jax.random.uniform(key, (), jnp.float32), side="right")


def _by_quarter(losses, t, num_steps):
    """Returns the sum and the number of the losses in each quarter of 1..T."""
    one_hot = jax.nn.one_hot((t - 1) * QUARTERS // num_steps, QUARTERS)
    return losses @ one_hot, one_hot.sum(axis=0)
