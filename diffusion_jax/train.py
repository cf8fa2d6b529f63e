"""Training: the loop around the step."""

import collections
import contextlib
import functools
import itertools
import math
import sys
import time

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import checkpoint, data, from_config, hosts, images, programs
from diffusion_jax.errors import UserError
from diffusion_jax.log import MetricsLog
from diffusion_jax.state import TrainState, abstract_state, init_state, replicate
from diffusion_jax.step import AXIS, configured_step, pmapped, resident, several

_TIGHT = 0.9  # of a device's memory, from which on a warning is due


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
    devices, processes = jax.device_count(), jax.process_count()
    main = jax.process_index() == 0  # the process that writes and prints
    workdir = checkpoint.absolute(workdir)
    dataset_images, dataset = _begin(config, workdir, main)

    sample_fn = from_config.sample_fn(config)
    monitor = _monitor(config, dataset_images) if config.train.evaluate_every else None
    local = (jax.local_device_count(), config.train.batch_size // devices)
    indices = (jax.process_index() + processes * np.arange(math.prod(local))).reshape(local)

    with checkpoint.open_manager(workdir, config.train.keep_checkpoints) as manager:
        state = checkpoint.restore(manager, abstract_state(config), set_aside=True) or init_state(config)
        start = int(state.step)
        if main:
            num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
            print(f"{num_parameters:,} parameters, {devices} {jax.devices()[0].platform} device(s), from step {start}")
        state = replicate(state, AXIS)
        dispatches = list(_dispatches(config, start))
        program, feed = _program(config, dataset_images, dataset, start, [k for k, _ in dispatches], local)
        if dispatches and (room := programs.room(jax.local_devices()[0])):
            pixels = next(feed)
            feed = itertools.chain([pixels], feed)
            lowered = program(dispatches[0][0]).lower(state, (pixels, indices))  # which it need not do again
            _foresee(config, lowered, room, config.train.num_steps - start, main)

        with (
            hosts.StopSignals() as signals,
            MetricsLog(workdir, start, config.train.log_every) if main else contextlib.nullcontext() as log,
            _progress(config, start) as bar,
        ):
            watch = _Watch(config, manager, log, bar, began)
            for k, step in dispatches:
                state, metrics = program(k)(state, (next(feed), indices))
                watch.add(step - k + 1, k, metrics)
                checkpoint.check(manager)

                draws = _due(config.train.sample_every, step)
                looks = _due(config.train.evaluate_every, step)
                saves = _due(config.train.checkpoint_every, step) or step == config.train.num_steps
                signum = signals.agreed(manager, step)
                # Drawing takes a while: whoever is stopped meanwhile has lost nothing.
                if saves or draws or looks or signum:
                    watch.rest()
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
                        log.add_evaluation(step, seen, time.monotonic() - asked)
                if draws:
                    _draw(sample_fn, state, config.seed, workdir, main)

    state = jax.device_get(state)
    grid = _draw(sample_fn, state, config.seed, workdir, main)
    if main:
        print(f"trained to step {state.step}; samples: {grid}")
    return state


def _begin(config, workdir, main):
    """(images, their batches), after all that can be refused was; the workdir then holds the config."""
    check_batch(config, jax.device_count())
    if (earlier := checkpoint.read_config(workdir)) is not None:
        from_config.check_same_run(earlier, config, workdir)
    dataset_images = from_config.images(config)
    dataset = data.batches(
        dataset_images,
        seed=config.seed,
        batch_size=config.train.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if main:
        checkpoint.write_config(workdir, config)
    hosts.check_shared(workdir)
    s = from_config.schedule(config)
    if main and s.alpha_bar[-1] > 0.05:
        print(
            f"warning: alpha_bar_T = {s.alpha_bar[-1]:.3f}: x_T still holds that share of the image, sampling starts "
            "without it; choose another config.schedule.name or a larger config.schedule.num_steps"
        )
    return dataset_images, dataset


class _Watch:
    """Looks at the metrics of the steps, two dispatches late, so that the device never runs dry."""

    def __init__(self, config, manager, log, bar, began):
        self._config, self._manager, self._log, self._bar, self._began = config, manager, log, bar, began
        self._learning_rate = from_config.learning_rate(config)
        self._pending, self._bad_steps = collections.deque(), 0

    def add(self, first, k, metrics):
        """Metrics [D, k] of the k steps from `first`, which may be still to come."""
        self._pending.append((first, k, metrics))
        if len(self._pending) > 2:  # by now this one is done, or nearly
            self._oldest()

    def rest(self):
        while self._pending:
            self._oldest()

    def _oldest(self):
        first, k, metrics = self._pending.popleft()
        metrics = {name: np.asarray(value)[0] for name, value in jax.device_get(metrics).items()}  # of one device
        if self._log and self._began:
            self._bar.write(f"first step after {time.monotonic() - self._began:.1f} s, compiled", file=sys.stdout)
            self._began = None
        for i in range(k):
            self._look(first + i, {name: float(value[i]) for name, value in metrics.items()})
        self._bar.update(k)

    def _look(self, step, line):
        train = self._config.train
        self._bad_steps = self._bad_steps + 1 if line["skipped"] else 0
        if self._bad_steps > train.max_bad_steps or not math.isfinite(line["param_norm"]):
            raise FloatingPointError(_not_finite(step, line, self._manager))
        line["learning_rate"] = float(self._learning_rate(step - 1))
        if self._log and (line := self._log.add(step, line, train.batch_size)):
            self._bar.set_postfix_str(f"loss {line['loss'] or math.nan:.4f}, {line['images_per_second']:.0f} images/s")


def _due(every, step):
    """Whether something that is done every so many steps, 0: never, is to be done after this one."""
    return bool(every) and step % every == 0


def check_batch(config: ConfigDict, devices: int) -> None:
    """Raises UserError unless the batch divides among the devices, and a device's share among its parts."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch % (devices * parts):
        among = f"{devices} devices" + (f" of config.train.accumulate={parts} parts each" if parts > 1 else "")
        raise UserError(
            f"config.train.batch_size={batch} does not divide among {among}: make it a multiple of {devices * parts}"
        )


def _foresee(config, lowered, room, num_steps, main):
    """Says what the steps to come need, as --mode=plan does. UserError if they do not fit into `room` bytes."""
    device, num_devices = jax.local_devices()[0], jax.device_count()
    try:
        program = programs.compiled(lowered)
    except programs.DoesNotFit as error:
        raise does_not_fit(config, device.device_kind, programs.shortage(error)) from None
    need = programs.needs(program, programs.chip_of(device), num_devices, config.train.accumulate)
    peak = need["memory"]["peak"]
    sizes = f"{peak / 2**30:.2f} of {room / 2**30:.2f} GiB"
    if peak > room:
        raise does_not_fit(config, device.device_kind, sizes)
    if not main:
        return
    if line := need["roofline"]:
        hours = line["seconds"] * num_steps / 3600
        print(
            f"estimate: at least {line['seconds'] * 1e3:.3g} ms a step, {hours:.3g} hours to the end; {sizes} a device"
        )
    if peak > _TIGHT * room:
        print(f"warning: the step takes {sizes} of a device: should it run out of memory, {mends(config)}")


def does_not_fit(config: ConfigDict, device: str, sizes: str) -> UserError:
    """What to say of a train step that is too large for a device."""
    return UserError(
        f"config.train.batch_size={config.train.batch_size} does not fit into a {device} ({sizes}): {mends(config)}"
    )


def mends(config: ConfigDict) -> str:
    """What makes the train step smaller, and is not done yet."""
    train = config.train
    options = [
        None if config.model.dtype == "bfloat16" else "config.model.dtype=bfloat16",
        None if train.remat else "config.train.remat=True",
        f"config.train.accumulate={2 * train.accumulate}",
        "config.data.on_device=False" if config.data.on_device else None,
    ]
    return f"set {', '.join(filter(None, options))}, lower config.train.batch_size, or take more devices"


def _dispatches(config, start):
    """(k, the step after): the steps to take at a time. Where something is to be done after a step, they end there.

    Whatever `start` is, they end at the same steps.
    """
    train, step = config.train, start
    every = [
        n for n in (train.steps_per_dispatch, train.checkpoint_every, train.sample_every, train.evaluate_every) if n
    ]
    while step < train.num_steps:
        end = min(train.num_steps, *(step - step % n + n for n in every))
        yield end - step, end
        step = end


def _program(config, dataset_images, dataset, start, ks, local):
    """(k -> k steps on all devices, the images for each of the dispatches `ks`)."""
    step = configured_step(config)
    if config.data.on_device:
        on_all = functools.cache(lambda k: pmapped(resident(step, k, config.seed, config.train.batch_size), None))
        return on_all, itertools.repeat(replicate(dataset_images[:], AXIS))
    on_all = pmapped(several(step))  # of as many as there are images for
    return lambda k: on_all, _to_devices(data.iterate(dataset, start, dataset_images.num_threads), ks, local)


def _to_devices(batches, ks, local):
    """Yields uint8 [D, k, B, H, W, C] that lie on the D local devices; two are on their way ahead of need."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))
    ahead = collections.deque()
    for k in ks:
        pixels = np.stack(list(itertools.islice(batches, k)))
        pixels = pixels.reshape(k, *local, *pixels.shape[2:]).swapaxes(0, 1)
        ahead.append(jax.device_put(pixels, sharding))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead


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
