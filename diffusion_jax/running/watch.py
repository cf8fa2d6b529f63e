"""Watches the steps of a training and of a sampler: metrics, a loss that is not finite, progress bars."""

import collections
import itertools
import math
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax import sampling
from diffusion_jax.running.log import MetricsLog


class Watch:
    """Reads the metrics of the steps two dispatches late, so that the devices never wait for the host."""

    def __init__(self, train: ConfigDict, manager: Any, log: MetricsLog | None, bar: tqdm.tqdm, began: float) -> None:
        """Takes train.* of the config, the checkpoint manager, process 0's log, the bar and the time of the start."""
        self._train = train
        self._manager, self._log, self._bar, self._began = manager, log, bar, began
        self._pending: collections.deque[tuple] = collections.deque()
        self._bad_steps = 0

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
        for i in range(k):
            self._read(first + i, {name: float(value[i]) for name, value in metrics.items()}, started)
        self._bar.update(k)

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


def progress_bar(start: int, num_steps: int) -> tqdm.tqdm:
    """Returns the bar of a training, which process 0 shows."""
    in_notebook = hasattr(sys, "ps1")
    return tqdm.tqdm(
        initial=start,
        total=num_steps,
        unit="step",
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 1 if in_notebook else 10,  # seconds; a log file needs fewer lines
        disable=jax.process_index() != 0,
    )


def progress_window(steps: int, num: int) -> sampling.Window:
    """Returns a window that moves a progress bar from inside the program; each call of the sampler restarts it."""
    every = max(1, steps // 100)
    reports = steps // every * len(jax.local_devices()[:num])  # each device reports
    bar = tqdm.tqdm(total=reports, desc="sampling", bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}")

    calls = itertools.count()  # thread-safe: each device reports from a thread of its own

    def report(_):
        done = next(calls) % reports + 1
        if done == 1:
            bar.reset()
        bar.n = done
        bar.update(0)
        if done == reports:
            bar.refresh()

    return sampling.Window(report, every)
