"""The training loop."""

import contextlib
import functools
import sys
import time
import types
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.data import pipeline, pixels
from diffusion_jax.pictures import grids
from diffusion_jax.planning import fit
from diffusion_jax.running import checkpoint, dispatch, due, history, hosts, snapshots
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.running.lock import Lock
from diffusion_jax.running.profile import Trace
from diffusion_jax.running.watch import Sampler, Watch, awaited, begun, metrics_log, progress_bar, waiting
from diffusion_jax.step import TrainState


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    loss: Callable | None = None,
    schedule: Callable | None = None,
    sigma: Callable | None = None,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    profile: int = 0,
) -> TrainState:
    """Trains to config.train.num_steps, from the last checkpoint of `workdir` if it has one.

    Args (a function, whose name config.json keeps, in place of a name in the config):
      loss: (eps_bar_fn, s, x_0, t, eps_bar) -> [B], as `losses.simple_loss`.
      schedule: (num_steps) -> Schedule, as `schedule.cosine`; `load` then needs it too.
      sigma: (s) -> [T + 1], as `schedule.sigma_beta`; `load` then needs it, or another one.
      images, labels: arrays as in a file of `arrays.arrays`, in place of data.source; kept in the workdir.
      profile: the number of steps to trace, see `profile.Trace`.

    Returns:
      The final state, NumPy arrays.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
      FloatingPointError: too many losses or gradients in a row are not finite.
      hosts.Stopped: a signal stopped the run after it saved its state.
    """
    began = time.monotonic()
    config = configs.with_functions(config, loss=loss, schedule=schedule, sigma=sigma)
    folder = workdirs.absolute(workdir)
    if images is not None:
        kept = hosts.on_main(functools.partial(workdirs.keep_images, folder, images, labels))
        config = configs.with_path(config, kept)
    configs.check(config)
    with contextlib.ExitStack() as stack:
        config, images, lock = _begin(config, folder, stack)
        parts.loss(config)  # raises for a function that only Python can give
        run = parts.build(config)
        keep = config.train.keep_checkpoints, config.train.checkpoint_every
        manager = stack.enter_context(checkpoint.open_manager(folder, *keep))
        state, new, about = _resume(config, run, folder, manager)
        sampler = Sampler(run.sample_fn, (run.num_samples, *run.image_shape), run.num_sampling_steps, state.params)
        if state.step < config.train.num_steps:
            state = _loop(config, run, folder, images, lock, manager, state, new, about, sampler, began, profile)
        checkpoint.wait(manager)  # a signal may end the drawing
        grid = _draw_grid(config, sampler, state, folder)
    if jax.process_index() == 0:
        print(f"trained to step {state.step}; samples{grids.drawn_as(len(run.image_shape) - 1)}: {grid}")
    return state


def _loop(config, run, folder, images, lock, manager, state, new, about, sampler, began, profile):
    """Takes the steps that are left, saves the last state and returns it, NumPy arrays."""
    start, pending = int(state.step), about.pop("metrics", ())
    indices = pipeline.split(pipeline.indices(config.train.batch_size))
    every = [config.train[f"{kind}_every"] for kind in ("sample", "evaluate", "snapshot", "checkpoint")]
    ends = [config.train.steps_per_dispatch, *every]
    dispatches = functools.partial(due.dispatches, start, config.train.num_steps, ends)
    of_data = {"on_device": config.data.on_device, "seed": config.seed, "batch_size": config.train.batch_size}
    ks = (k for k, _ in dispatches())
    program, batch, feed = dispatch.program_and_feed(run.train_step, images, start, ks, indices.shape, **of_data)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(hosts.StopSignals())
        with signals.at_once(start):
            left, first = config.train.num_steps - start, program(next(dispatches())[0])
            least = fit.foresee(config, first, (dispatch.replicated(state), (batch, indices)), left)
            state = dispatch.replicate(awaited("initialising the network", new) if new else state)
            fit.foresee_sampler(config, sampler, state)
        log = stack.enter_context(metrics_log(folder, start, config.train.log_every, pending))
        bar = stack.enter_context(progress_bar(start, config.train.num_steps))
        watch = Watch(config.train, manager, log, bar, began, least)
        look = _looks(config, run, images, folder, sampler, log, signals, manager)
        look(state, start)  # what a signal or a kill at this step has left out
        trace = stack.enter_context(Trace(profile, folder, start))
        feed, is_first_save = trace.watched(feed), True
        for k, end in dispatches():
            state, metrics = program(k)(state, (next(feed), indices))
            watch.add(end - k + 1, k, metrics)
            trace.after(end, metrics)
            checkpoint.check(manager)
            lock.check()

            signum = signals.agreed(manager, end)
            # Samples and evaluations take a while: the state is saved before them.
            if signum or end == config.train.num_steps or due.is_due(end, every):
                watch.finish()
                checkpoint.save(manager, end, state, about | {"metrics": list(log.pending) if log else []})
                if is_first_save:
                    checkpoint.verify(manager, end, run.abstract_state())
                    is_first_save = False
            if signum:
                checkpoint.wait(manager)
                raise hosts.Stopped(end, signum)
            look(state, end)
        if log:
            log.finish(end, config.train.batch_size)
    return jax.device_get(state)


def _looks(config, run, images, folder, sampler, log, signals, manager):
    """Returns look(state, step), which keeps the averages, evaluates and draws a grid where due and not done yet."""
    if config.train.evaluate_every:
        from diffusion_jax.evaluation.monitor import build  # imports SciPy and scikit-learn, which takes a second

        monitor = build(config, run, images)

    def look(state, number):
        every = [config.train[f"{kind}_every"] for kind in ("snapshot", "sample", "evaluate")]
        keeps, draws, evaluates = (due.is_due(number, [each]) for each in every)
        if keeps:
            hosts.on_main(lambda: snapshots.write(folder, number, state.averages))
        if not (draws or evaluates):
            return
        checkpoint.wait(manager)
        with signals.at_once(number):
            if evaluates and not hosts.on_main(lambda: log.has_evaluation(number)):
                started = time.monotonic()
                params = jax.device_get(state.ema_params)
                measured = waiting("evaluating", functools.partial(monitor, params, number, folder))
                if log:
                    log.add_evaluation(number, measured, time.monotonic() - started)
            if draws:
                _draw_grid(config, sampler, state, folder)

    return look


# ---------------------------------------------------------------- before the loop


def _begin(config, folder, stack):
    """Validates everything, locks the workdir and returns the config with its classes, the images and the lock."""
    hosts.check_same(configs.flatten(config) | {"--workdir": folder})
    configs.check_batch(config, jax.device_count())
    workdirs.check_name(folder)
    locks = [stack.enter_context(Lock(folder))] if hosts.on_main(folder.exists) else []  # before the long work
    old = workdirs.read_config(folder) if hosts.on_main(lambda: workdirs.holds_run(folder)) else config
    configs.check_same_run(old, config, folder)
    images = parts.images(config)
    config = configs.with_classes(configs.with_dtype(config, images.array_dtype), images.classes)
    configs.check_same_run(old, config, folder)
    locks = locks or [stack.enter_context(Lock(folder))]
    hosts.check_shared(folder)
    alpha_bar = float(parts.schedule(config).alpha_bar[-1])
    for text in configs.warnings(config, alpha_bar) if jax.process_index() == 0 else ():
        print(f"warning: {text}")
    return config, images, locks[0]


def _resume(config, run, folder, manager):
    """Returns (the state to start from, None, what its checkpoints say about it), and writes config.json and run.json.

    A new run has the shapes of its state and, in the second place, the future of it: the train step compiles meanwhile.
    """
    shapes = run.abstract_state()
    state = checkpoint.restore(manager, shapes, set_aside=True)
    step = None if state is None else int(state.step)
    about = {} if step is None else checkpoint.read_about(manager, step)
    identity = history.identity(folder, config, about, step)
    new = None if state else begun(lambda: snapshots.with_averages(run.init_state(), run.num_averages))
    state, start = snapshots.with_averages(state or shapes._replace(step=np.int32(0)), run.num_averages), step or 0
    hosts.on_main(lambda: workdirs.write_config(folder, config))
    changes = hosts.on_main(lambda: history.record(folder, identity, start, config))
    hosts.on_main(lambda: snapshots.resume(folder, config.train.snapshot_every, config.train.num_steps, state))
    if jax.process_index() == 0:
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        print(f"{num_parameters:,} parameters, {devices}, from step {start}")
        if changes:
            print(f"the config has changed ({', '.join(changes)}); run.json keeps both")
        if start > config.train.num_steps:
            print(f"the run has taken more steps than config.train.num_steps={config.train.num_steps}: nothing to do")
    return state, new, about | history.about(identity, config)


# ---------------------------------------------------------------- in the loop


def _draw_grid(config, sampler, state, folder) -> epath.Path:
    """Draws the grid of samples of this step unless it exists and can be read; returns its path."""
    path = folder / "samples" / f"{int(state.step)}.png"
    if not hosts.on_main(lambda: grids.is_readable(path)):
        x = pixels.to_uint8(sampler(jax.device_get(state.ema_params), jax.random.key(config.seed)))
        if jax.process_index() == 0:
            grids.save_png(path, grids.by_class(x, config.data.classes, has_alpha=configs.has_alpha(config)))
    return path


class _Callable(types.ModuleType):
    """This module, which is a function too: diffusion_jax.train(config, workdir) is diffusion_jax.train.train."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable
