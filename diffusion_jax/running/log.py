"""The numbers of a run: means over intervals, to metrics.jsonl and to TensorBoard."""

import contextlib
import json
import tempfile
import time

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from diffusion_jax.errors import UserError


class MetricsLog:
    """Collects what each step reports; every `every` steps it writes the means.

    Lines of steps after `start` are dropped first: those steps are about to be done again.
    """

    def __init__(self, workdir: epath.Path, start: int, every: int):
        self._every = every
        self._steps = []
        self._loss = None  # of the last line
        self._path = workdir / "metrics.jsonl"
        self._lines = self._kept(start)
        # A bucket's files cannot grow: they are written anew, and the events by way of a local folder.
        self._remote = "://" in str(workdir)
        self._events_folder = epath.Path(tempfile.mkdtemp()) if self._remote else workdir
        # Written at once: the usual writer's thread dies of a full disk, and then its queue blocks the run for ever.
        self._events = EventsWriter(str(self._events_folder / "events"))
        purge = Event(step=start + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._events.write_event(purge)  # hides what an earlier run has said of later steps
        self._time = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # a full disk, which has been told
            self._events.close()

    def add(self, step: int, metrics: dict[str, float], batch_size: int) -> dict[str, float] | None:
        """Takes the metrics of `step`; NaN where the step says nothing of one.

        Returns:
          The line that was written, or None between the lines.
        """
        self._steps.append(metrics)
        if step % self._every:
            return None
        seconds = (time.monotonic() - self._time) / len(self._steps)
        line = {"step": step} | {name: _mean([m[name] for m in self._steps]) for name in metrics}
        line |= {"steps_per_second": 1 / seconds, "images_per_second": batch_size / seconds}
        self._steps.clear()
        self._loss = line["loss"]
        self._write_or_say(line)
        self._time = time.monotonic()
        return line

    def add_seen(self, step: int, seen: dict[str, float], seconds: float) -> None:
        """Writes a line of its own of what was measured after `step`, in a time that does not count as training's.

        Its loss is a mean too, so that all lines make one curve: of the steps since the last line, and where `step`
        has just had its line, the same again.
        """
        loss = _mean([metrics["loss"] for metrics in self._steps]) if self._steps else self._loss
        self._write_or_say({"step": step, "loss": loss} | seen)
        self._time += seconds

    def _write_or_say(self, line):
        try:
            self._write(line)
        except OSError as error:
            raise UserError(
                f"{self._path} or the events beside it cannot be written ({error}): make room or mend the rights; the "
                "same command goes on from the last checkpoint"
            ) from error

    def _write(self, line):
        text = json.dumps(line) + "\n"
        if self._remote:
            self._lines.append(text)
            self._path.write_text("".join(self._lines))
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

    def _kept(self, step):
        """Drops the lines of the steps after `step` from the file, and returns the others."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self._path)
        return kept


def _step(line):
    """The step of a line; infinite if the line is not whole, as after a kill."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else np.inf
    except (ValueError, KeyError, TypeError):
        return np.inf


def _mean(values):
    """The mean of the finite numbers, None (null in JSON, which has no NaN) where there are none."""
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else None
