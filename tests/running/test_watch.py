"""Long work: it says what it does, returns what it should, and signals need not wait for it."""

import os
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest

from diffusion_jax.running import hosts, watch


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch):
    monkeypatch.setattr(watch, "SILENT", 0.05)
    monkeypatch.setattr(watch, "TICK", 0.02)


def test_long_work_is_named_and_short_work_is_not(capsys):
    assert watch.waiting("short work", lambda: 1) == 1
    assert watch.waiting("long work", lambda: time.sleep(0.2) or 2) == 2
    err = capsys.readouterr().err
    assert "long work … 00:00" in err and "short work" not in err


def test_the_first_call_of_a_sampler_is_named(capsys):
    def sample_fn(x, slow=0.0):
        time.sleep(slow)
        return 2 * x

    sample_fn.lower = "lower"
    told = watch.told(sample_fn, "compiling, and drawing")
    assert told(3, slow=0.2) == 6 and "compiling, and drawing … 00:00" in capsys.readouterr().err
    assert told(4, slow=0.2) == 8 and not capsys.readouterr().err
    assert told.lower == "lower"
    assert jax.jit(watch.told(sample_fn, ""))(5) == 10  # inside a program it is no call


def test_an_error_of_the_work_is_raised():
    with pytest.raises(ZeroDivisionError):
        watch.waiting("short work", lambda: 1 / 0)

    def late():
        time.sleep(0.1)
        raise TimeoutError("of the work")

    with pytest.raises(TimeoutError, match="of the work"):
        watch.waiting("long work", late)


def test_a_share_makes_a_bar_and_an_estimate(capsys, monkeypatch):
    monkeypatch.setattr(watch, "LONG", 0.4)
    monkeypatch.setattr(watch, "SURE", 0.0)
    watch.waiting("drawing", lambda: time.sleep(0.3), lambda: 0.25, "fewer steps take less")
    err = capsys.readouterr().err
    assert re.search(r"drawing: about \d+ s; fewer steps take less\n", err) and "drawing: 100%|" in err


def test_a_signal_acts_while_the_work_goes_on(monkeypatch):
    """And the process then leaves without waiting for the thread."""
    ended, codes = threading.Event(), []
    monkeypatch.setattr(watch.os, "_exit", codes.append)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    refused = pytest.raises(hosts.Stopped, match="after step 7, which is saved")
    with hosts.StopSignals() as signals, refused as stopped, signals.at_once(7):
        watch.waiting("compiling", lambda: ended.wait(20))
    assert not ended.is_set() and stopped.value.exit_code == 128 + signal.SIGTERM
    assert watch.leave(143) == 143 and codes == [143]
    ended.set()
    while watch._running:
        time.sleep(0.01)
    assert watch.leave(0) == 0 and codes == [143]


def test_a_signal_outside_waits_for_the_next_block():
    with hosts.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.signum == signal.SIGTERM
        with pytest.raises(hosts.Stopped, match="before its first step: run the same command"), signals.at_once(0):
            pytest.fail("the block ran")


def test_durations():
    assert [watch.duration(x) for x in (3, 89, 91, 5399, 5400, 90_000)] == [
        *("3 s", "89 s", "2 min", "90 min", "1.5 h", "25.0 h"),
    ]


@pytest.mark.parametrize("is_long", [False, True])
def test_a_sampler_counts_its_steps_only_where_it_takes_long(is_long, monkeypatch, capsys):
    """A program that counts them is compiled at each start."""
    monkeypatch.setattr(watch, "WITH_BAR", 0 if is_long else 1e9)
    windows = []

    def make(window):
        windows.append(window)

        def sample_fn(params, rng, first, labels):
            for t in range(8) if window else ():
                window.report(t)
            return np.full((2, 4, 4, 1), params["a"] + first)

        sample_fn.lower = lambda *arguments: jax.jit(lambda: 0).lower()
        return sample_fn

    sampler = watch.Sampler(make, (2, 4, 4, 1), 1000, {"a": np.ones(1)})
    assert sampler({"a": 1.0}, jax.random.key(0), 2).tolist() == np.full((2, 4, 4, 1), 3.0).tolist()
    assert (windows[0] is not None) == is_long
    if is_long:
        assert windows[0].every == 10
        assert sampler._done == pytest.approx(8 / (100 * len(jax.local_devices()[:2])))
