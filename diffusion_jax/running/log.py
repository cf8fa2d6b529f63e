"""The metrics of a run: means over intervals of steps, written to metrics.jsonl and to TensorBoard."""

import contextlib
import json
import tempfile
import time
from typing import Self

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from diffusion_jax.errors import UserError
from diffusion_jax.running import files


class MetricsLog:
    """Collects the metrics of each step and writes their means every `every` steps.

    A resumed run repeats the steps after `start`, so the log first drops the lines of those steps.
    """

    def __init__(self, workdir: epath.Path, start: int, every: int) -> None:
        self._every = every
        self._steps: list[dict[str, float]] = []
        self._loss: float | None = None  # the loss of the last line
        self._path = workdir / "metrics.jsonl"
        self._lines = self._drop_lines_after(start)
        # Files in a bucket cannot grow: metrics.jsonl is rewritten, and events are copied from a local folder.
        self._remote = "://" in str(workdir)
        self._events_folder = epath.Path(tempfile.mkdtemp()) if self._remote else workdir
        # The usual writer's thread dies when the disk is full, and its queue then blocks the run for ever.
        # EventsWriter writes without a thread.
        self._events = EventsWriter(str(self._events_folder / "events"))
        purge = Event(step=start + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._events.write_event(purge)  # hides the events that an earlier run wrote for later steps
        self._time = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `add` has already reported a full disk
            self._events.close()

    def add(self, step: int, metrics: dict[str, float], batch_size: int) -> dict[str, float] | None:
        """Adds the metrics of `step`, where NaN marks a missing value, and ends the interval if one is due.

        Returns:
          The line that was written, or None if `step` ends no interval.

        Raises:
          UserError: the log cannot be written.
        """
        self._steps.append(metrics)
        if step % self._every:
            return None
        seconds = (time.monotonic() - self._time) / len(self._steps)
        line = {"step": step} | {name: _mean([m[name] for m in self._steps]) for name in metrics}
        line |= {"steps_per_second": 1 / seconds, "images_per_second": batch_size / seconds}
        self._steps.clear()
        self._loss = line["loss"]
        self._write_or_raise(line)
        self._time = time.monotonic()
        return line

    def add_evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Writes a separate line of metrics measured after `step`, and excludes `seconds` from the training time.

        The line repeats the loss so that all lines form one curve: the mean over the steps since the
        last line, or the loss of that line if `step` has just written one.

        Raises:
          UserError: the log cannot be written.
        """
        loss = _mean([m["loss"] for m in self._steps]) if self._steps else self._loss
        self._write_or_raise({"step": step, "loss": loss} | metrics)
        self._time += seconds

    def _write_or_raise(self, line):
        try:
            self._write(line)
        except OSError as error:
            raise UserError(
                f"{self._path} or the TensorBoard events beside it cannot be written ({error}): make room or "
                "fix the permissions, then run the same command to resume from the last checkpoint"
            ) from error

    def _write(self, line):
        text = json.dumps(line) + "\n"
        if self._remote:
            self._lines.append(text)
            files.write_text(self._path, "".join(self._lines))
        else:
            with self._path.open("a") as file:
                file.write(text)
        values = [
            Summary.Value(tag=name, simple_value=x) for name, x in line.items() if x is not None and name != "step"
        ]
        self._events.write_event(Event(step=line["step"], summary=Summary(value=values), wall_time=time.time()))
        self._events.flush()
        if self._remote:
            for file in self._events_folder.iterdir():
                file.copy(self._path.parent / file.name, overwrite=True)

    def _drop_lines_after(self, step):
        """Removes the lines of the steps after `step` from the file, and returns the other lines."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        files.write_text(self._path, "".join(kept))
        return kept


def parse_line(text: bytes) -> dict | None:
    """Returns a line of metrics.jsonl, or None if it is damaged: no JSON object, or no integer "step" from 0."""
    try:
        line = json.loads(text)
        step = line["step"]
    except (ValueError, KeyError, TypeError, RecursionError):  # RecursionError: nested too deeply
        return None
    return line if isinstance(line, dict) and type(step) is int and 0 <= step < 2**63 else None


def _step(line):
    """Returns the step of a line, or infinity for an incomplete line, which a killed process leaves."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else np.inf
    except (ValueError, KeyError, TypeError):
        return np.inf


def _mean(values):
    """Returns the mean of the finite values, or None (null in JSON, which has no NaN) if there are none."""
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else None
