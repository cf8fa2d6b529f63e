"""Training: one pmapped step, and the loop around it."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import checkpoint, data, from_config, hosts, images
from diffusion_jax.errors import UserError
from diffusion_jax.log import MetricsLog
from diffusion_jax.schedule import Schedule
from diffusion_jax.state import TrainState, abstract_state, init_state, replicate

AXIS = "batch"  # of the pmapped step
QUARTERS = 4  # of 1..T, for which the loss is reported one by one

# The stream of the seed that training draws from; see also state.py.
_TRAIN = 2**32 - 2


def make_train_step(*args) -> Callable:
    """`make_step` of the same arguments, pmapped: images, indices and metrics get a leading axis of the D devices."""
    return jax.pmap(make_step(*args), axis_name=AXIS, in_axes=(None, 0), out_axes=(None, 0), donate_argnums=0)


def make_step(
    apply_fn: Callable,
    loss_fn: Callable,
    s: Schedule,
    optimizer: optax.GradientTransformation,
    ema_decay,
    seed: int,
    t_probabilities=None,
) -> Callable:
    """The step on one device, to be mapped over AXIS: (state, (images, indices)) -> (state, metrics).

    t, noise and dropout of an example are a function of (seed, state.step, its index in
    the global batch) alone, so any number of devices takes the same step.

    Args:
      apply_fn: the UNet's `apply`.
      loss_fn: (output_fn, s, x_0, t, keys [B]) -> [B], output_fn(x, t) the network's output.
      t_probabilities: [T + 1] of the steps t; losses are weighted by 1 / (T p_t), which leaves their
        mean as it is. None: uniform in 1..T.

    The step's arguments: images uint8 [B, H, W, C] and indices int [B], the device's share of the global
    batch; the state has no device axis (`state.replicate`), and its memory is given away. Its metrics are the
    same on all devices: loss, grad_norm (before clipping), param_norm, skipped, and loss_t1 ... loss_t4
    over the quarters of 1..T, NaN where the batch has no such t. Where one of the first three
    is not finite, skipped is 1 and the state stays as it was, but for its step.
    """

    def mean_loss(params, x_0, t, noise_keys, dropout_keys):
        def output_fn(x, t):
            return apply_fn({"params": params}, x, t, train=True, dropout_keys=dropout_keys)

        losses = loss_fn(output_fn, s, x_0, t, noise_keys)
        weights = 1.0 if t_probabilities is None else 1 / (s.num_steps * jnp.asarray(t_probabilities, jnp.float32)[t])
        return jnp.mean(weights * losses), losses

    def step(state, batch):
        pixels, indices = batch
        x_0 = pixels.astype(jnp.float32) / 127.5 - 1
        step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TRAIN), state.step)
        keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(step_key, index), 3))(indices)
        t = jax.vmap(lambda key: _draw_t(key, s.num_steps, t_probabilities))(keys[:, 0])

        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, losses), grads = gradient(state.params, x_0, t, keys[:, 1], keys[:, 2])
        loss, grads = lax.pmean((loss, grads), AXIS)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        new = TrainState(state.step + 1, params, ema_params, opt_state)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        # One bad number would stay in Adam's moments and the average for ever: then only the step counts.
        good = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state._replace(step=new.step))
        metrics |= {"skipped": 1.0 - good} | _loss_by_quarter(losses, t, s.num_steps)
        return new, metrics

    return step


def _draw_t(key, num_steps, probabilities):
    if probabilities is None:
        return jax.random.randint(key, (), 1, num_steps + 1)
    below = np.cumsum(probabilities)[1:-1]  # P(t <= 1), …, P(t <= T − 1)
    return 1 + jnp.searchsorted(jnp.asarray(below, jnp.float32), jax.random.uniform(key), side="right")


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
      FloatingPointError: too many losses or gradients in a row that are not finite.
      hosts.Stopped: told to by a signal, after saving.
    """
    began = time.monotonic()
    # ------------------------------------------------------------ what can be refused is refused first
    devices, processes = jax.device_count(), jax.process_count()
    main = jax.process_index() == 0  # the process that writes and prints
    if config.train.batch_size % devices:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} does not divide among {devices} devices: "
            f"make it a multiple of {devices}"
        )
    workdir = checkpoint.absolute(workdir)
    if (earlier := checkpoint.read_config(workdir)) is not None:
        from_config.check_same_run(earlier, config, workdir)
    dataset_images = from_config.images(config)
    dataset = data.batches(
        dataset_images,
        seed=config.seed,
        batch_size=config.train.batch_size,
        flip=config.data.flip,
        process_index=jax.process_index(),
        process_count=processes,
    )
    if main:
        checkpoint.write_config(workdir, config)
    hosts.check_shared(workdir)

    # ------------------------------------------------------------ state and step
    s = from_config.schedule(config)
    if main and s.alpha_bar[-1] > 0.05:
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
        from_config.t_probabilities(config),
    )
    sample_fn = from_config.sample_fn(config)
    monitor = _monitor(config, dataset_images) if config.train.evaluate_every else None
    learning_rate = from_config.learning_rate(config)
    local = (jax.local_device_count(), config.train.batch_size // devices)
    indices = (jax.process_index() + processes * np.arange(math.prod(local))).reshape(local)

    with checkpoint.open_manager(workdir, config.train.keep_checkpoints) as manager:
        state = checkpoint.restore(manager, abstract_state(config), set_aside=True) or init_state(config)
        start = int(state.step)
        if main:
            num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
            print(f"{num_parameters:,} parameters, {devices} {jax.devices()[0].platform} device(s), from step {start}")
        state = replicate(state, AXIS)
        batches = _to_devices(data.iterate(dataset, start, dataset_images.num_threads), local)

        # -------------------------------------------------------- the loop
        with (
            hosts.StopSignals() as signals,
            MetricsLog(workdir, start, config.train.log_every) if main else contextlib.nullcontext() as log,
            _progress(config, start) as bar,
        ):
            pending, bad_steps = collections.deque(), 0

            def record():  # the metrics of the oldest step not yet looked at
                nonlocal bad_steps
                step, metrics = pending.popleft()
                metrics = {name: float(value[0]) for name, value in jax.device_get(metrics).items()}
                bad_steps = bad_steps + 1 if metrics["skipped"] else 0
                if main and step == start + 1:
                    bar.write(f"first step after {time.monotonic() - began:.1f} s, compiled", file=sys.stdout)
                if bad_steps > config.train.max_bad_steps:
                    raise FloatingPointError(_not_finite(step, metrics, manager))
                metrics["learning_rate"] = float(learning_rate(step - 1))
                if main and (line := log.add(step, metrics, config.train.batch_size)):
                    bar.set_postfix_str(
                        f"loss {line['loss'] or math.nan:.4f}, {line['images_per_second']:.0f} images/s"
                    )
                bar.update()

            for step in range(start + 1, config.train.num_steps + 1):
                state, metrics = train_step(state, (next(batches), indices))
                pending.append((step, metrics))
                if len(pending) > 2:  # by now this one is done, or nearly: the device never runs dry
                    record()
                checkpoint.check(manager)

                draws = config.train.sample_every and step % config.train.sample_every == 0
                looks = monitor and step % config.train.evaluate_every == 0
                signum = signals.agreed(manager, step)
                # Drawing takes a while: whoever is stopped meanwhile has lost nothing.
                if (
                    step % config.train.checkpoint_every == 0
                    or step == config.train.num_steps
                    or draws
                    or looks
                    or signum
                ):
                    while pending:
                        record()
                    checkpoint.save(manager, step, state)
                if signum:
                    checkpoint.wait(manager)
                    raise hosts.Stopped(
                        f"stopped by a signal after step {step}, which is saved: the same command goes on", signum
                    )
                if looks:
                    asked = time.monotonic()
                    seen = monitor(jax.device_get(state.ema_params), step, workdir, main)
                    if main:
                        log.add_seen(step, seen, time.monotonic() - asked)
                if draws:
                    _draw(sample_fn, state, config.seed, workdir, main)

    # ------------------------------------------------------------ the end
    state = jax.device_get(state)
    grid = _draw(sample_fn, state, config.seed, workdir, main)
    if main:
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


def _draw(sample_fn, state, seed, workdir, main):
    """Makes the grid of samples of this step, unless it is there already; process `main` writes it."""
    path = workdir / "samples" / f"{state.step}.png"
    if not path.exists():
        x = sample_fn(jax.device_get(state.ema_params), jax.random.key(seed))
        if main:
            images.save_png(path, images.grid(images.to_uint8(x)))
    return path


def _monitor(config, dataset_images):
    from diffusion_jax.monitor import Monitor  # imports SciPy and scikit-learn, which takes a second

    return Monitor(config, dataset_images)


def _progress(config, start):
    return tqdm.tqdm(
        initial=start,
        total=config.train.num_steps,
        unit="step",
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file needs fewer lines
        disable=jax.process_index() != 0,
    )


def _not_finite(step, metrics, manager):
    name = next(name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(metrics[name]))
    return (
        f"{name} is {metrics[name]} at step {step}; the last checkpoint is of step {manager.latest_step()}: lower "
        "config.train.learning_rate, try float32 if config.model.dtype is bfloat16, or leave such steps out with "
        "config.train.max_bad_steps"
    )
