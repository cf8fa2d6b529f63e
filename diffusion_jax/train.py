"""Training: one pmapped step, and the loop around it."""

import collections
import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import checkpoint, data, from_config, images
from diffusion_jax.errors import UserError
from diffusion_jax.log import MetricsLog
from diffusion_jax.schedule import Schedule
from diffusion_jax.state import TrainState, abstract_state, init_state, replicate

AXIS = "batch"  # of the pmapped step
QUARTERS = 4  # of 1..T, for which the loss is reported one by one

# The stream of the seed that training draws from; see also state.py.
_TRAIN = 2**32 - 2


def make_train_step(
    apply_fn: Callable, loss_fn: Callable, s: Schedule, optimizer: optax.GradientTransformation, ema_decay, seed: int
) -> Callable:
    """The pmapped step: (state, (images, indices)) -> (state, metrics). Gives the old state's memory away.

    t, noise and dropout of an example are a function of (seed, state.step, its index in
    the global batch) alone, so any number of devices takes the same step.

    Args:
      apply_fn: the UNet's `apply`.
      loss_fn: (eps_bar_fn, s, x_0, t, keys [B]) -> [B].

    The step's arguments: images uint8 [D, B, H, W, C] and indices int [D, B] over the D
    local devices; the state has no device axis (`state.replicate`). Its metrics are arrays [D],
    all D the same: loss, grad_norm (before clipping), param_norm, and loss_t1 ... loss_t4
    over the quarters of 1..T, NaN where the batch has no such t.
    """

    def mean_loss(params, x_0, t, noise_keys, dropout_keys):
        def eps_bar_fn(x, t):
            return apply_fn({"params": params}, x, t, train=True, dropout_keys=dropout_keys)

        losses = loss_fn(eps_bar_fn, s, x_0, t, noise_keys)
        return jnp.mean(losses), losses

    def step(state, batch):
        pixels, indices = batch
        x_0 = pixels.astype(jnp.float32) / 127.5 - 1
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TRAIN), state.step)
        keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(step_key, index), 3))(indices)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 1, s.num_steps + 1))(keys[:, 0])

        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, losses), grads = gradient(state.params, x_0, t, keys[:, 1], keys[:, 2])
        loss, grads = lax.pmean((loss, grads), AXIS)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        metrics |= _loss_by_quarter(losses, t, s.num_steps)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, 0), donate_argnums=0)


def _loss_by_quarter(losses, t, num_steps):
    one_hot = jax.nn.one_hot((t - 1) * QUARTERS // num_steps, QUARTERS)
    sums, counts = lax.psum((losses @ one_hot, one_hot.sum(axis=0)), AXIS)
    return {f"loss_t{i + 1}": sums[i] / counts[i] for i in range(QUARTERS)}


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains to config.train.num_steps, from the last checkpoint of `workdir` if there is one.

    Returns:
      The final state, NumPy arrays.

    Raises:
      UserError: the config, data or workdir cannot be used.
      FloatingPointError: a loss or gradient that is not finite.
    """
    # ------------------------------------------------------------ what can be refused is refused first
    devices, processes = jax.device_count(), jax.process_count()
    if config.train.batch_size % devices:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} does not divide among {devices} devices: "
            f"make it a multiple of {devices}"
        )
    workdir = checkpoint.absolute(workdir)
    if (earlier := checkpoint.read_config(workdir)) is not None:
        from_config.check_same_model(earlier, config, workdir)
    dataset_images = from_config.images(config)
    dataset = data.batches(
        dataset_images,
        seed=config.seed,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        process_index=jax.process_index(),
        process_count=processes,
    )
    checkpoint.write_config(workdir, config)

    # ------------------------------------------------------------ state and step
    s = from_config.schedule(config)
    if s.alpha_bar[-1] > 0.05:
        print(
            f"warning: alpha_bar_T = {s.alpha_bar[-1]:.3f}: x_T still holds that share of the image, sampling starts "
            "without it; choose another config.schedule.name or a larger config.schedule.num_steps"
        )
    train_step = make_train_step(
        from_config.model(config).apply,
        from_config.loss(config),
        s,
        from_config.optimizer(config),
        config.train.ema_decay,
        config.seed,
    )
    sample_fn = from_config.sample_fn(config)
    learning_rate = from_config.learning_rate(config)
    local = (jax.local_device_count(), config.train.batch_size // devices)
    indices = (jax.process_index() + processes * np.arange(math.prod(local))).reshape(local)

    with checkpoint.open_manager(workdir, config.train.keep_checkpoints) as manager:
        state = checkpoint.restore(manager, abstract_state(config)) or init_state(config)
        start = int(state.step)
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        print(f"{num_parameters:,} parameters, {devices} {jax.devices()[0].platform} device(s), from step {start}")
        state = replicate(state, AXIS)
        batches = _to_devices(data.iterate(dataset, start, dataset_images.num_threads), local)

        # -------------------------------------------------------- the loop
        with MetricsLog(workdir, start, config.train.log_every) as log, _progress(config, start) as bar:
            pending = collections.deque()

            def record():  # the metrics of the oldest step not yet looked at
                step, metrics = pending.popleft()
                metrics = {name: float(value[0]) for name, value in jax.device_get(metrics).items()}
                _stop_if_not_finite(step, metrics, manager)
                metrics["learning_rate"] = float(learning_rate(step - 1))
                if line := log.add(step, metrics, config.train.batch_size):
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
                bar.update()

            for step in range(start + 1, config.train.num_steps + 1):
                state, metrics = train_step(state, (next(batches), indices))
                pending.append((step, metrics))
                if len(pending) > 2:  # by now this one is done, or nearly: the device never runs dry
                    record()

                if step % config.train.checkpoint_every == 0 or step == config.train.num_steps:
                    while pending:
                        record()
                    checkpoint.save(manager, step, state)
                if config.train.sample_every and step % config.train.sample_every == 0:
                    _draw(sample_fn, state, config.seed, workdir)

    # ------------------------------------------------------------ the end
    state = jax.device_get(state)
    grid = _draw(sample_fn, state, config.seed, workdir)
    print(f"trained to step {state.step}; samples: {grid}")
    return state


def _to_devices(batches, local):
    """Yields uint8 [D, B, H, W, C] that lie on the D local devices; two batches are on their way ahead of need."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))
    ahead = collections.deque()
    for pixels in batches:
        ahead.append(jax.device_put(pixels.reshape(*local, *pixels.shape[1:]), sharding))
        if len(ahead) > 2:
            yield ahead.popleft()


def _draw(sample_fn, state, seed, workdir):
    """Makes the grid of samples of this step, unless it is there already."""
    path = workdir / "samples" / f"{state.step}.png"
    if not path.exists():
        x = sample_fn(jax.device_get(state.ema_params), jax.random.key(seed))
        images.save_png(path, images.grid(images.to_uint8(x)))
    return path


def _progress(config, start):
    return tqdm.tqdm(
        initial=start,
        total=config.train.num_steps,
        unit="step",
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file needs fewer lines
        disable=jax.process_index() != 0,
    )


def _stop_if_not_finite(step, metrics, manager):
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if bad:
        raise FloatingPointError(
            f"{bad[0]} is {metrics[bad[0]]} at step {step}; the last checkpoint is of step {manager.latest_step()}: "
            "lower config.train.learning_rate, or try float32 if config.model.dtype is bfloat16"
        )
