"""The metrics of a run: means over intervals of steps, written to metrics.jsonl and to TensorBoard."""

import contextlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from diffusion_jax.errors import UserError
from diffusion_jax.running import files


class MetricsLog:
    """Collects the metrics of each step and writes their means every `every` steps.

    A resumed run repeats the steps after `start`, so the log first drops the lines of those steps. The steps of an
    interval that began before `start` come from the checkpoint, so the lines do not depend on where a run stopped.
    """

    def __init__(self, workdir: epath.Path, start: int, every: int, pending: Sequence[dict[str, float]] = ()) -> None:
        """Opens the log; `pending` is `self.pending` at `start`."""
        self._every = every
        self.pending: list[dict[str, float]] = list(pending)  # the steps since the last line
        self._path = workdir / "metrics.jsonl"
        # Files in a bucket cannot grow: metrics.jsonl is rewritten, and events are copied from a local folder.
        self._remote = self._is_remote()
        self._content, self._last = self._drop_lines_after(start)
        self._events_folder = epath.Path(tempfile.mkdtemp()) if self._remote else workdir
        # The usual writer's thread dies when the disk is full, and its queue then blocks the run for ever.
        # EventsWriter writes without a thread.
        self._events = EventsWriter(str(self._events_folder / "events"))
        purge = Event(step=start + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._events.write_event(purge)  # hides the events that an earlier run wrote for later steps
        # When the last step of the last line was read, and when it was handed to the devices; the steps since then.
        self._read = self._started = time.monotonic()
        self._timed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `add` has already reported a full disk
            self._events.close()

    def add(
        self, step: int, metrics: dict[str, float], batch_size: int, started: float | None = None
    ) -> dict[str, float] | None:
        """Adds the metrics of `step`, where NaN marks a missing value, and ends the interval if one is due.

        Args:
          started: `time.monotonic()` when the step was handed to the devices. Its metrics are read later, and those
            of several steps at once before a checkpoint.

        Returns:
          The line that was written, or None if `step` ends no interval.

        Raises:
          UserError: the log cannot be written.
        """
        self.pending.append(metrics)
        self._timed += 1
        return None if step % self._every else self._end_interval(step, batch_size, started)

    def finish(self, step: int, batch_size: int) -> None:
        """Writes the line of the last interval of a run, if it is shorter than the others."""
        if self.pending:
            self._end_interval(step, batch_size, None)

    def _end_interval(self, step, batch_size, started):
        now = time.monotonic()
        started = now if started is None else started
        # Steps are handed over ahead of the devices, or read at once when they have long been done.
        speed = self._timed / max(now - self._read, started - self._started, 1e-9)
        line = {"step": step} | {name: _mean([m[name] for m in self.pending]) for name in self.pending[-1]}
        line |= {"steps_per_second": speed, "images_per_second": batch_size * speed}
        self.pending.clear()
        self._write_or_raise(line)
        self._read, self._started, self._timed, self._last = now, started, 0, line
        return line

    def has_evaluation(self, step: int) -> bool:
        """True if the last line is an evaluation after `step`, see `add_evaluation`."""
        return self._last.get("step") == step and "steps_per_second" not in self._last

    def add_evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Writes a separate line of metrics measured after `step`, and excludes `seconds` from the training time.

        The line repeats the loss so that all lines form one curve: the mean over the steps since the
        last line, or the loss of that line if `step` has just written one.

        Raises:
          UserError: the log cannot be written.
        """
        loss = _mean([m["loss"] for m in self.pending]) if self.pending else self._last.get("loss")
        self._last = {"step": step, "loss": loss} | {name: _mean([value]) for name, value in metrics.items()}
        self._write_or_raise(self._last)
        self._read += seconds
        self._started += seconds

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
            self._content += text.encode()
            with files.replacing(self._path) as file:
                file.write(self._content)
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

    def _is_remote(self):
        return "://" in str(self._path)

    def _drop_lines_after(self, step):
        """Cuts the file after the last line of the steps up to `step`.

        Returns:
          (the content if the file is remote, the last line that stays). Reads a local file from its end.
        """
        if not self._path.exists():
            return b"", {}
        if self._remote:
            content = self._path.read_bytes()
            end, last = _end(content, step, self._every)
            with files.replacing(self._path) as file:
                file.write(content[:end])
            return content[:end], last
        with open(self._path, "r+b") as file:
            if not file.seek(0, os.SEEK_END):
                return b"", {}
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end, last = _end(content, step, self._every)
            file.truncate(end)
            os.fsync(file.fileno())
        return b"", last


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Returns a line of metrics.jsonl, or None if it is damaged: no JSON object, or no integer "step" from 0."""
    try:
        line = json.loads(text)
        step = line["step"]
    except (ValueError, KeyError, TypeError, RecursionError):  # RecursionError: nested too deeply
        return None
    return line if isinstance(line, dict) and type(step) is int and 0 <= step < 2**63 else None


def _end(content, step, every):
    """Returns (where the lines of the steps up to `step` end, the last of them), and reads from the end.

    The line of a last, shorter interval at `step` does not stay: the interval goes on.
    """
    end = len(content)
    while end:
        begin = content.rfind(b"\n", 0, end - 1) + 1
        line = parse_line(content[begin:end]) if content[end - 1 : end] == b"\n" else None  # a kill left a part
        is_short = line and line["step"] == step and step % every and "steps_per_second" in line
        if line and line["step"] <= step and not is_short:
            return end, line
        end = begin
    return 0, {}


def _mean(values):
    """Returns the mean of the finite values, or None (null in JSON, which has no NaN) if there are none."""
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else None
