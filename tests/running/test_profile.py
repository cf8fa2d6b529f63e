from typing import NamedTuple

import jax
import pytest

from diffusion_jax.running import profile


class Event(NamedTuple):
    name: str
    start_ns: float
    end_ns: float

    @property
    def duration_ns(self):
        return self.end_ns - self.start_ns


class Line(NamedTuple):
    name: str
    events: list


class Plane(NamedTuple):
    name: str
    lines: list


class Profile(NamedTuple):
    planes: list


WAITS = Line("python", [Event(profile.INPUT, 0, 2e6), Event(profile.INPUT, 5e6, 6e6), Event("other", 0, 9e6)])


def test_time_that_events_cover():
    def covered(*spans):
        return profile._covered([Event("dot", *span) for span in spans])

    assert covered() == (0, 0, 0)
    assert covered((2e9, 3e9), (0, 1e9), (0.5e9, 1.5e9)) == (2.5, 0.5, 3)
    assert covered((0, 4e9), (1e9, 2e9), (9e9, 10e9)) == (5, 5, 10)


def test_summary_of_a_cpu():
    first = [Event("fusion.1", 0, 4e6), Event("end: fusion.1", 4e6, 9e6), Event("ThunkExecutor::Execute", 0, 9e6)]
    threads = [
        Line("tf_XLAEigen/1", first),
        Line("tf_XLAEigen/2", [Event("fusion.1", 2e6, 6e6), Event("dot", 8e6, 9e6)]),
    ]
    found = profile.summary(Profile([Plane("/host:CPU", [WAITS, *threads])]))
    assert found == (0.009, 0.007, 0.002, 0.003, pytest.approx(0.009), [("fusion.1", 0.008), ("dot", 0.001)], 3)
    text = profile._text(found, 10, 12, 0.01)
    assert text.startswith(
        "traced steps 11 to 12: 5 ms a step\n- the device computes 70.0% of the time; the longest gap is"
    )
    assert "waits for input 30.0% of the time" in text and "| fusion.1       | 4 " in text and "| 89% " in text
    assert "| all operations | 4.5 " in text and "| 100% " in text


def test_an_operation_within_another_is_counted_once():
    events = [Event("call", 0, 4e6), Event("fusion", 1e6, 3e6), Event("dot", 5e6, 6e6)]
    found = profile.summary(Profile([Plane("/host:CPU", [Line("tf_XLAEigen/1", events)])]))
    assert found.work == 0.005 and found.operations == [("call", 0.004), ("fusion", 0.002), ("dot", 0.001)]


@pytest.mark.parametrize("line", ["XLA Ops", "Stream #1"])
def test_summary_of_an_accelerator(line):
    """On a TPU the operations have a line of their own; the others repeat them."""
    lines = [Line(line, [Event("dot", 1e6, 2e6)])] + [Line("Steps", [Event("1", 0, 8e6)])] * (line == "XLA Ops")
    host = Plane("/host:CPU", [WAITS, Line("tf_XLAEigen/1", [Event("copy", 0, 9e6)])])
    found = profile.summary(Profile([host, Plane("/device:TPU:0", lines)]))
    assert found == (0.001, 0.001, 0.0, 0.003, 0.001, [("dot", 0.001)], 1)


def test_no_trace_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", None)  # nothing waits for a step
    feed = iter([1, 2])
    with profile.Trace(0, tmp_path, 0) as trace:
        assert trace.watched(feed) is feed
        trace.after(1000, None)
    assert not list(tmp_path.iterdir())


def test_a_trace_that_an_error_cuts_is_ended(tmp_path):
    def fail():
        with profile.Trace(5, tmp_path, 0) as trace:
            trace.after(profile.WARM_UP, ())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    jax.profiler.start_trace(str(tmp_path))  # refused while another trace runs
    jax.profiler.stop_trace()
