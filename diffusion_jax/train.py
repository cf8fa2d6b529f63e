"""The training loop."""

import collections
import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import parts, step
from diffusion_jax.data import cache, pipeline, pixels
from diffusion_jax.pictures import grids
from diffusion_jax.planning import fit
from diffusion_jax.running import checkpoint, hosts
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.running.log import MetricsLog
from diffusion_jax.step import AXIS, TrainState

_KINDS = ("sample", "evaluate", "checkpoint")  # work that recurs every train.<kind>_every steps


def train(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Trains to config.train.num_steps, from the last checkpoint of `workdir` if it has one.

    Returns:
      The final state, NumPy arrays.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      FloatingPointError: too many losses or gradients in a row are not finite.
      hosts.Stopped: a signal stopped the run after it saved its state.
    """
    began = time.monotonic()
    configs.check(config)
    folder, run = workdirs.absolute(workdir), parts.build(config)
    images = _begin(config, folder)
    sample_fn = run.sample_fn()
    monitor = _monitor(config, run, images) if config.train.evaluate_every else None
    indices = _indices(config.train.batch_size)
    is_main_process = jax.process_index() == 0  # it writes and prints

    with checkpoint.open_manager(folder, config.train.keep_checkpoints) as manager:
        state = checkpoint.restore(manager, run.abstract_state(), set_aside=True) or run.init_state()
        start = int(state.step)
        if is_main_process:
            _announce(state, start)
        state = step.replicate(state)
        dispatches = functools.partial(_dispatches, config.train, start)  # no list: 2^31 steps take all memory
        program, feed = _program(config, run, images, start, (k for k, _ in dispatches()), indices.shape)
        if start < config.train.num_steps:
            batch = next(feed)
            feed = itertools.chain([batch], feed)
            first, num_steps = next(dispatches())[0], config.train.num_steps - start
            fit.foresee(config, program(first), (state, (batch, indices)), num_steps)

        with (
            hosts.StopSignals() as signals,
            MetricsLog(folder, start, config.train.log_every) if is_main_process else contextlib.nullcontext() as log,
            _progress(start, config.train.num_steps) as bar,
        ):
            watch = _Watch(config.train, run.learning_rate, manager, log, bar, began)
            for k, end in dispatches():
                state, metrics = program(k)(state, (next(feed), indices))
                watch.add(end - k + 1, k, metrics)
                checkpoint.check(manager)

                due = {kind: _is_due(config.train[f"{kind}_every"], end) for kind in _KINDS}
                signum = signals.agreed(manager, end)
                # Samples and evaluations take a while: the state is saved before them.
                if any(due.values()) or signum or end == config.train.num_steps:
                    watch.finish()
                    checkpoint.save(manager, end, state)
                if signum:
                    checkpoint.wait(manager)
                    raise hosts.Stopped(
                        f"stopped by a signal after step {end}, which is saved: run the same command to resume", signum
                    )
                if due["evaluate"] and monitor:
                    started = time.monotonic()
                    measured = monitor(jax.device_get(state.ema_params), end, folder)
                    if log:
                        log.add_evaluation(end, measured, time.monotonic() - started)
                if due["sample"]:
                    _draw_grid(sample_fn, state, config.seed, folder)

    state = jax.device_get(state)
    grid = _draw_grid(sample_fn, state, config.seed, folder)
    if is_main_process:
        print(f"trained to step {state.step}; samples: {grid}")
    return state


# ---------------------------------------------------------------- before the loop


def prepare(config: ConfigDict) -> None:
    """Makes the cache of a config's data set, and prints the size and the place of the images.

    Raises:
      UserError: see `sources.open_source` and `cache.open_images`.
    """
    configs.check(config)
    start = time.monotonic()
    images = parts.images(config)
    count, height, width, channels = images.shape
    place = f"cache: {images.folder}" if isinstance(images, cache.Cached) else "no cache"
    print(f"{count:,} images, {height}x{width}x{channels}, ready in {time.monotonic() - start:.1f} s; {place}")


def _begin(config, folder):
    """Validates everything, writes config.json and returns the images."""
    configs.check_batch(config, jax.device_count())
    if workdirs.holds_run(folder):
        configs.check_same_run(workdirs.read_config(folder), config, folder)
    images = parts.images(config)
    if jax.process_index() == 0:
        workdirs.write_config(folder, config)
    hosts.check_shared(folder)
    alpha_bar = float(parts.schedule(config).alpha_bar[-1])
    for text in configs.warnings(config, alpha_bar) if jax.process_index() == 0 else ():
        print(f"warning: {text}")
    return images


def _indices(batch_size):
    """Returns the indices of this process's examples in the global batch, int [D, B] for its D devices."""
    shape = (jax.local_device_count(), batch_size // jax.device_count())
    return (jax.process_index() + jax.process_count() * np.arange(math.prod(shape))).reshape(shape)


def _announce(state, start):
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    print(f"{num_parameters:,} parameters, {devices}, from step {start}")


def _monitor(config, run, images):
    from diffusion_jax.evaluation.monitor import Monitor  # imports SciPy and scikit-learn, which takes a second

    held_out = parts.images(config, config.data.test_split) if config.data.test_split else None
    return Monitor(run, images, held_out)


def _dispatches(train, start):
    """Yields (k, end) for each dispatch: k steps in one program, the last of which is `end`.

    A dispatch ends at every step that has work due after it. The ends do not depend on `start`.
    """
    every = [train.steps_per_dispatch, train.checkpoint_every, train.sample_every, train.evaluate_every]
    while start < train.num_steps:
        end = min(train.num_steps, *(start - start % n + n for n in every if n))
        yield end - start, end
        start = end


def _program(config, run, images, start, ks, shape):
    """Returns (k -> the program of k steps on all devices, an iterator over the batches of the dispatches)."""
    batch_size = config.train.batch_size
    if config.data.on_device:
        several = functools.cache(
            lambda k: step.pmapped(step.resident(run.train_step, k, config.seed, batch_size), batch_axis=None)
        )
        return several, itertools.repeat(step.replicate(images.examples(np.arange(len(images)))))
    several = step.pmapped(step.several(run.train_step))  # takes as many steps as it gets batches
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    dataset = pipeline.batches(images, seed=config.seed, batch_size=batch_size, **processes)
    return lambda k: several, _to_devices(pipeline.iterate(dataset, start, images.num_threads), ks, shape)


def _to_devices(
    batches: Iterator[dict[str, np.ndarray]], ks: Iterable[int], shape: tuple[int, int]
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of each dispatch, arrays [D, k, B, …] on the D local devices; prefetches two dispatches."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))
    ahead: collections.deque[dict[str, jax.Array]] = collections.deque()

    def stacked(*steps):
        array = np.stack(steps)
        return array.reshape(len(steps), *shape, *array.shape[2:]).swapaxes(0, 1)

    for k in ks:
        ahead.append(jax.device_put(jax.tree.map(stacked, *itertools.islice(batches, k)), sharding))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead


# ---------------------------------------------------------------- in the loop


class _Watch:
    """Reads the metrics of the steps two dispatches late, so that the devices never wait for the host."""

    def __init__(self, train, learning_rate, manager, log, bar, began):
        self._train, self._learning_rate = train, learning_rate
        self._manager, self._log, self._bar, self._began = manager, log, bar, began
        self._pending, self._bad_steps = collections.deque(), 0

    def add(self, first, k, metrics):
        """Queues the metrics [D, k] of the k steps from `first`, which may not have run yet."""
        self._pending.append((first, k, metrics))
        if len(self._pending) > 2:  # by now the oldest has run, or almost
            self._read_oldest()

    def finish(self):
        """Reads the metrics of all steps so far."""
        while self._pending:
            self._read_oldest()

    def _read_oldest(self):
        first, k, metrics = self._pending.popleft()
        metrics = {name: np.asarray(value)[0] for name, value in jax.device_get(metrics).items()}  # of one device
        if self._log and self._began:
            self._bar.write(f"first step after {time.monotonic() - self._began:.1f} s, compiled", file=sys.stdout)
            self._began = None
        for i in range(k):
            self._read(first + i, {name: float(value[i]) for name, value in metrics.items()})
        self._bar.update(k)

    def _read(self, number, line):
        self._bad_steps = self._bad_steps + 1 if line["skipped"] else 0
        if self._bad_steps > self._train.max_bad_steps or not math.isfinite(line["param_norm"]):
            raise FloatingPointError(_not_finite(number, line, self._manager))
        line["learning_rate"] = float(self._learning_rate(number - 1))
        if self._log and (line := self._log.add(number, line, self._train.batch_size)):
            self._bar.set_postfix_str(f"loss {line['loss'] or math.nan:.4f}, {line['images_per_second']:.0f} images/s")


def _is_due(every: int, number: int) -> bool:
    """True if step `number` is a multiple of `every`; 0 means never."""
    return bool(every) and number % every == 0


def _draw_grid(sample_fn, state, seed, folder) -> epath.Path:
    """Draws the grid of samples of this step unless it exists; returns its path."""
    path = folder / "samples" / f"{state.step}.png"
    if not path.exists():
        x = sample_fn(jax.device_get(state.ema_params), jax.random.key(seed))
        if jax.process_index() == 0:
            grids.save_png(path, grids.grid(pixels.to_uint8(x)))
    return path


def _progress(start, num_steps):
    return tqdm.tqdm(
        initial=start,
        total=num_steps,
        unit="step",
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file needs fewer lines
        disable=jax.process_index() != 0,
    )


def _not_finite(number, metrics, manager):
    name = next(name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(metrics[name]))
    return (
        f"{name} is {metrics[name]} at step {number}; the last checkpoint is of step {manager.latest_step()}: lower "
        "config.train.learning_rate, try float32 if config.model.dtype is bfloat16, or skip such steps with "
        "config.train.max_bad_steps"
    )
