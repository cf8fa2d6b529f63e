"""Watches the steps of a training and of a sampler: metrics, a loss that is not finite, progress bars, long work."""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm
from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax import sampling
from diffusion_jax.running.log import MetricsLog

SILENT = 0.4  # seconds of work that `waiting` does not mention
TICK = 0.5  # seconds between two looks at the work
SURE = 3  # seconds after which an estimate is one
LONG = 60  # seconds from which on the time of the work is estimated in a line of its own
FEW = 25  # steps of a fast sampler that look much like all 1,000
# FLOPs per second that a sampler reaches, roughly; the bar of one that takes longer than WITH_BAR seconds is counted
# inside its program. JAX keeps no program with a callback on disk, so shorter ones go without.
_SPEED, WITH_BAR = {"cpu": 5e10, "gpu": 5e13, "tpu": 5e13}, 20

Result = TypeVar("Result")
_running: set[threading.Thread] = set()


class Watch:
    """Reads the metrics of the steps two dispatches late, so that the devices never wait for the host."""

    def __init__(
        self,
        train: ConfigDict,
        manager: Any,
        log: MetricsLog | None,
        bar: tqdm.tqdm,
        began: float,
        least: float | None = None,
    ) -> None:
        """Makes the watch.

        Args:
          train: train.* of the config.
          manager: the checkpoint manager.
          log: process 0's log.
          bar: the progress bar.
          began: the time of the start, in seconds of `time.monotonic`.
          least: the least seconds of a step, see `fit.foresee`.
        """
        self._train = train
        self._manager, self._log, self._bar, self._began = manager, log, bar, began
        self._least = least
        self._pending: collections.deque[tuple] = collections.deque()
        self._bad_steps = 0
        self._first: tuple[float, int] | None = None  # when the first steps were read, and the number of the last
        self._is_foretold = False

    def add(self, first: int, k: int, metrics: dict[str, jax.Array]) -> None:
        """Queues the metrics [D, k] of the k steps from `first`, which may not have run yet."""
        self._pending.append((first, k, metrics, time.monotonic()))
        if len(self._pending) > 2:  # by now the oldest has run, or almost
            self._read_oldest()

    def finish(self) -> None:
        """Reads the metrics of all steps so far."""
        while self._pending:
            self._read_oldest()

    def _read_oldest(self):
        first, k, metrics, started = self._pending.popleft()
        metrics = {name: np.asarray(value)[0] for name, value in jax.device_get(metrics).items()}  # of one device
        if self._log and self._began:
            self._bar.write(f"first step after {time.monotonic() - self._began:.1f} s, compiled", file=sys.stdout)
            self._began = None
        self._foretell(first + k - 1)
        for i in range(k):
            self._read(first + i, {name: float(value[i]) for name, value in metrics.items()}, started)
        self._bar.update(k)

    def _foretell(self, number):
        """Prints how long a step and the rest take, once, after some seconds of steps."""
        self._first = self._first or (time.monotonic(), number)
        seconds, steps = time.monotonic() - self._first[0], number - self._first[1]
        if self._log and not self._is_foretold and seconds > SURE and steps:
            self._is_foretold, rest = True, (self._train.num_steps - number) * seconds / steps
            if self._least:
                step = seconds / steps
                text = f"measured: {step * 1e3:.3g} ms a step, {self._least / step:.0%} of the device's peak"
                self._bar.write(text, file=sys.stdout)
            if rest > LONG:
                text = f"{self._train.num_steps - number:,} steps are left, about {duration(rest)} without grids"
                self._bar.write(f"{text}; fewer: --config.train.num_steps", file=sys.stdout)

    def _read(self, number, line, started):
        self._bad_steps = self._bad_steps + 1 if line["skipped"] else 0
        if self._bad_steps > self._train.max_bad_steps or not math.isfinite(line["param_norm"]):
            raise FloatingPointError(_not_finite(number, line, self._manager))
        if self._log and (line := self._log.add(number, line, self._train.batch_size, started)):
            self._bar.set_postfix_str(f"loss {line['loss'] or math.nan:.4f}, {line['images_per_second']:.0f} images/s")


def _not_finite(number, metrics, manager):
    name = next(name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(metrics[name]))
    return (
        f"{name} is {metrics[name]} at step {number}; the last checkpoint is of step {manager.latest_step()}: lower "
        "config.train.learning_rate, try float32 if config.model.dtype is bfloat16, or skip such steps with "
        "config.train.max_bad_steps"
    )


def metrics_log(
    folder: epath.Path, start: int, every: int, pending: Sequence[dict[str, float]]
) -> contextlib.AbstractContextManager[MetricsLog | None]:
    """Opens the metrics of the run in process 0, which writes and prints; returns a context of None in the others."""
    return contextlib.nullcontext() if jax.process_index() else MetricsLog(folder, start, every, pending)


@contextlib.contextmanager
def progress_bar(start: int, num_steps: int) -> Iterator[tqdm.tqdm]:
    """Yields the bar of a training, which process 0 shows. On a terminal its clock runs on between two steps."""
    ended, in_notebook = threading.Event(), hasattr(sys, "ps1")
    bar = tqdm.tqdm(
        initial=start,
        total=num_steps,
        unit="step",
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 1 if in_notebook else 10,  # seconds; a log file needs fewer lines
        disable=jax.process_index() != 0,
    )

    def tick():
        while not ended.wait(1):
            bar.refresh()

    with bar:
        if sys.stderr.isatty():
            threading.Thread(target=tick, daemon=True).start()
        try:
            yield bar
        finally:
            ended.set()


def progress_window(steps: int, num: int) -> sampling.Window:
    """Returns a window that moves a progress bar from inside the program; each call of the sampler restarts it."""
    bar = tqdm.tqdm(total=1.0, desc="sampling", bar_format=_BAR)

    def report(share):
        bar.n = share
        bar.refresh()

    return _counting_window(steps, num, report)


def _counting_window(steps, num, report):
    """Returns a window that calls report(the share of the chain that is done)."""
    every = max(1, steps // 100)
    reports = steps // every * len(jax.local_devices()[:num])  # each device reports
    calls = itertools.count()  # thread-safe: each device reports from a thread of its own
    return sampling.Window(lambda _: report((next(calls) % reports + 1) / reports), every)


# ---------------------------------------------------------------- long work

_BAR = "{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}"


def waiting(
    text: str, work: Callable[[], Result], share: Callable[[], float] | None = None, shorter: str | None = ""
) -> Result:
    """Returns work(), and shows on stderr what is done and for how long.

    A thread works and this one waits, so that Ctrl-C and the signals of `hosts.StopSignals` act at once, although
    XLA compiles and computes without a look at them. The thread itself cannot be stopped, see `leave`.

    Args:
      text: what is done, e.g. "compiling the train step".
      share: returns the share of the work that is done; None if it is not known.
      shorter: how to make the work shorter, in words; printed with an estimate if it takes more than LONG seconds; None
        prints no estimate.
    """
    return awaited(text, begun(work), share, shorter)


def begun(work: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Starts work in a thread and returns its future, for `awaited`."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    thread = threading.Thread(target=_fulfil, args=(future, work))
    _running.add(thread)
    thread.start()
    return future


def awaited(
    text: str,
    future: concurrent.futures.Future[Result],
    share: Callable[[], float] | None = None,
    shorter: str | None = "",
) -> Result:
    """Returns the result of `begun`, and shows what is done, see `waiting`."""
    concurrent.futures.wait([future], SILENT)
    if not future.done():
        _show(text, future, share, shorter)
    return future.result()


def _show(text, future, share, shorter):
    """Shows a bar, or the time that has passed, until the future is done."""
    began, is_told, shape = time.monotonic() - SILENT, shorter is None, _BAR if share else "{desc} … {elapsed}"
    is_other = jax.distributed.is_initialized() and jax.process_index() != 0  # alone, work may touch no device
    with tqdm.tqdm(total=1.0, desc=text, bar_format=shape, leave=None, disable=is_other) as bar:
        while not concurrent.futures.wait([future], TICK).done:
            bar.n, seconds = share() if share else 0.0, time.monotonic() - began
            if not is_told and bar.n and seconds > SURE and seconds / bar.n > LONG:
                is_told = True
                bar.write(f"{text}: about {duration(seconds / bar.n)}{shorter and '; '}{shorter}", file=sys.stderr)
            if sys.stderr.isatty():  # a log file needs the first and the last state alone
                bar.refresh()
        bar.n = 1.0


def _fulfil(future, work):
    try:
        future.set_result(work())
    except BaseException as error:  # `waiting` raises it in the thread that waits
        future.set_exception(error)
    finally:
        _running.discard(threading.current_thread())


def leave(code: int) -> int:
    """Returns the exit code of a command; ends the process if the work of a `waiting` runs on after a signal.

    Python would wait for its thread, and XLA aborts if a thread ends within a program.
    """
    if _running:
        sys.stdout.flush()
        os._exit(code)
    return code


def duration(seconds: float) -> str:
    """Returns a time in words of two digits: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def told(sample_fn: Callable, text: str) -> Callable:
    """Returns the sampler, whose first call shows the text and the time that passes, see `waiting`."""
    calls = itertools.count()

    def told_fn(*arguments, **named):
        if next(calls) or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, named))):
            return sample_fn(*arguments, **named)
        return waiting(text, lambda: jax.block_until_ready(sample_fn(*arguments, **named)))

    told_fn.lower = sample_fn.lower  # type: ignore[attr-defined]
    return told_fn


class Sampler:
    """A sampler that shows what it does: sampler(params, rng, first=0, labels=None) -> float32 [N, H, W, C], NumPy."""

    def __init__(
        self,
        make: Callable[..., Any],
        shape: tuple[int, ...],
        num_steps: int,
        params: Any,
        flags: str = "config.sampling.",
    ) -> None:
        """Makes the sampler.

        Args:
          make: (window=window) -> sample_fn, see `sampling.make_sample_fn`.
          shape: (N, H, W, C), or that of signals or volumes.
          num_steps: evaluations of the network for an image.
          params: the network's parameters or their shapes.
          flags: the beginning of the flags that choose a faster sampler.
        """
        num, *sizes, _ = shape
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._text = f"drawing {num:,} images, {num_steps:,} steps"
        self._shorter: str | None = ""
        if num_steps > FEW:
            self._shorter = f"--{flags}sampler=dpmpp_2m --{flags}steps={FEW} take {FEW / num_steps:.0%} of it"
        self._done, self._share, self._is_compiled = 0.0, None, False
        # A convolution uses each parameter at each pixel of its level, about a third of all pixels on average.
        flops = 2 / 3 * num_parameters * math.prod(sizes) * num * num_steps / jax.device_count()
        window = None
        if flops > WITH_BAR * _SPEED.get(jax.default_backend(), 5e13):
            window, self._share = _counting_window(num_steps, num, self._report), lambda: self._done
        self._sample_fn = make(window=window)
        self.lower = self._sample_fn.lower

    def _report(self, share):
        self._done = share

    def compile(self, *arguments: Any) -> None:
        """Compiles the program for arguments of these shapes, once."""
        if not self._is_compiled:
            waiting("compiling the sampler", lambda: self.lower(*arguments).compile())
            self._is_compiled = True

    def __call__(self, params: Any, rng: jax.Array, first: int = 0, labels: Any = None) -> np.ndarray:
        """Returns the images as `sampling.make_sample_fn` does; the first call compiles."""
        arguments = params, rng, first, labels
        self.compile(*arguments)
        self._done = 0.0
        shorter, self._shorter = self._shorter, None  # one estimate is enough
        return waiting(self._text, lambda: np.asarray(self._sample_fn(*arguments)), self._share, shorter)
