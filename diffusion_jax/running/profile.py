"""A trace of some steps of a training, by jax.profiler, and its summary."""

import collections
import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath

from diffusion_jax.running.tables import markdown_table

WARM_UP = 10  # steps before the trace: the first ones compile and fill the queues
INPUT = "waiting for input"  # the name of the host's events
TOP = 8  # operations in the summary
# Events on the threads of XLA's CPU client that wait, or only mark another event.
_NO_WORK = ("ThreadpoolListener::", "ThunkExecutor::", "end: ", "Wait ", "SlinkyThreadPool::Await", "Task ")

Item = TypeVar("Item")


class Summary(NamedTuple):
    """Seconds of a trace. On a CPU the device is XLA's threads, and busy while one of them computes."""

    seconds: float  # from the first event to the last
    busy: float  # of the device
    longest_gap: float  # of the device
    waiting: float  # of the host, for input
    work: float  # of operations, added over all devices and threads
    operations: Sequence[tuple[str, float]]  # the TOP operations, of all devices and threads together
    launches: int  # of operations


class Trace:
    """Traces `num_steps` steps of a training after WARM_UP ones, and prints a summary; 0 costs nothing.

        with Trace(20, folder, start) as trace:
            for step, batch in enumerate(trace.watched(batches), start + 1):
                state, metrics = train_step(state, batch)
                trace.after(step, metrics)

    The files are for xprof, TensorBoard and Perfetto. Process 0 traces its own devices alone.
    """

    def __init__(self, num_steps: int, folder: epath.Path, start: int) -> None:
        """Takes the number of steps, the folder of the run and the step that it starts from."""
        self._num_steps = 0 if jax.process_index() else num_steps
        self._folder, self._first = folder / "profile", start + WARM_UP
        self._began: tuple[int, float] | None = None  # the last step before the trace, and the time

    def watched(self, feed: Iterable[Item]) -> Iterator[Item]:
        """Returns the same items; the trace shows how long the loop waits for each."""
        return _annotated(iter(feed)) if self._num_steps else iter(feed)

    def after(self, step: int, metrics: Any) -> None:
        """Starts or ends the trace after step `step`, whose metrics may still be computed."""
        if not self._num_steps or step < self._first:
            return
        if not self._began:
            jax.block_until_ready(metrics)
            start(self._folder)
            self._began = step, time.monotonic()
        elif step >= self._began[0] + self._num_steps:
            jax.block_until_ready(metrics)
            self._end(step)

    def _end(self, step):
        begin, began = self._began
        self._num_steps = 0
        seconds = time.monotonic() - began
        jax.profiler.stop_trace()
        file, found = read(self._folder)
        print(_text(found, begin, step, seconds))
        print(f"the trace: {file}; open it with `xprof {self._folder}`, or TensorBoard's profile plugin")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._num_steps:
            return
        if self._began:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                jax.profiler.stop_trace()
        if not any(error):
            end = (self._began[0] if self._began else self._first) + self._num_steps
            print(f"{'the trace was cut' if self._began else 'nothing was traced'}: the run ended before step {end}")


def _annotated(iterator):
    for number in itertools.count():
        with jax.profiler.StepTraceAnnotation("dispatch", step_num=number):  # from these xprof knows the steps
            with jax.profiler.TraceAnnotation(INPUT):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def start(folder: epath.Path) -> None:
    """Starts a trace of JAX's events, which `jax.profiler.stop_trace` writes into the folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # which slows the host down
    jax.profiler.start_trace(str(folder), profiler_options=options)


def read(folder: epath.Path) -> tuple[epath.Path, Summary]:
    """Returns the file of the last trace in the folder, and its summary."""
    file = max(folder.glob("plugins/profile/*/*.xplane.pb"))  # the folders are named by the time
    return file, summary(jax.profiler.ProfileData.from_file(str(file)))


def summary(profile: Any) -> Summary:
    """Returns the summary of a trace, a `jax.profiler.ProfileData`."""
    on_cpu = [line for plane in profile.planes if plane.name == "/host:CPU" for line in plane.lines]
    lines = [line for plane in profile.planes if plane.name.startswith("/device:") for line in plane.lines]
    lines = [line for line in lines if line.name == "XLA Ops"] or lines  # a TPU's other lines hold the same time again
    lines = lines or [line for line in on_cpu if line.name.startswith("tf_XLA")]
    by_line = [
        [event for event in line.events if event.duration_ns > 0 and not event.name.startswith(_NO_WORK)]
        for line in lines
    ]
    everything = list(itertools.chain(*by_line))
    waits = [event for line in on_cpu for event in line.events if event.name == INPUT]
    busy, longest_gap, window = _covered(everything)
    work = sum(_covered(events)[0] for events in by_line)  # an operation's own operations are in its time
    totals: collections.Counter = collections.Counter()
    for event in everything:
        totals[event.name] += event.duration_ns / 1e9
    waiting = sum(event.duration_ns for event in waits) / 1e9
    return Summary(window, busy, longest_gap, waiting, work, totals.most_common(TOP), len(everything))


def _covered(events: Sequence[Any]) -> tuple[float, float, float]:
    """Returns the seconds that events of a trace cover together, the longest gap, and first to last."""
    spans = [(event.start_ns, event.end_ns) for event in events]
    busy, longest, end = 0.0, 0.0, min((span[0] for span in spans), default=0.0)
    first = end
    for start, stop in sorted(spans):
        longest = max(longest, start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e9, longest / 1e9, (end - first) / 1e9


def _text(found: Summary, begin: int, end: int, seconds: float) -> str:
    def share(part):
        return f"{part / max(seconds, 1e-9):.1%}"

    lines = [
        f"traced steps {begin + 1} to {end}: {seconds / (end - begin) * 1e3:.4g} ms a step",
        f"- the device computes {share(found.busy)} of the time; the longest gap is {found.longest_gap * 1e3:.3g} ms",
        f"- the loop waits for input {share(found.waiting)} of the time",
        "",
    ]
    rows = [
        (name, f"{total / (end - begin) * 1e3:.3g}", f"{total / max(found.work, 1e-9):.0%}")
        for name, total in [*found.operations, ("all operations", found.work)]
    ]
    return "\n".join([*lines, *markdown_table(("operation", "ms a step, all threads", "share of all"), rows)])
