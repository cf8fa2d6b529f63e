import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from diffusion_jax.errors import UserError
from diffusion_jax.planning import fit, programs
from diffusion_jax.running import hosts

PROGRAM = jax.jit(lambda x: x @ x)
ARGS = (jnp.zeros((8, 8)),)


def foresee(monkeypatch, peak, room=10**9):
    monkeypatch.setattr(programs, "room", lambda device: room)
    monkeypatch.setattr(programs, "memory_needed", lambda program: peak)
    fit.foresee(tiny_config(), PROGRAM, ARGS, 10)


def test_a_step_that_is_tight_gets_a_warning(monkeypatch, capsys):
    foresee(monkeypatch, peak=10**8)
    assert capsys.readouterr().out == ""
    foresee(monkeypatch, peak=95 * 10**7)
    assert "warning: the step takes 0.88 of 0.93 GiB of a device" in capsys.readouterr().out


def test_a_step_that_is_too_large_is_refused_with_the_remedies(monkeypatch):
    with pytest.raises(UserError, match=r"batch_size=8 does not fit into a cpu \(1.86 of 0.93 GiB\): set .*remat=True"):
        foresee(monkeypatch, peak=2 * 10**9)


def test_a_compiler_that_runs_out_of_memory_is_reported(monkeypatch):
    def fails(lowered):
        raise programs.DoesNotFit("Used 24.00G of 15.75G hbm. Program (24.00G) exceeds limit (15.75G)")

    monkeypatch.setattr(programs, "compiled", fails)
    with pytest.raises(UserError, match=r"does not fit into a cpu \(.*Program \(24.00G\) exceeds limit \(15.75G\)"):
        foresee(monkeypatch, peak=0)


def test_an_estimate_that_fails_stops_nothing(monkeypatch, capsys):
    def fails(lowered):
        raise RuntimeError("no analysis on this backend")

    monkeypatch.setattr(programs, "compiled", fails)
    foresee(monkeypatch, peak=0)
    assert capsys.readouterr().out == "no estimate of memory and time (no analysis on this backend)\n"


def test_a_device_that_reports_no_memory_is_left_alone(monkeypatch, capsys):
    foresee(monkeypatch, peak=2 * 10**9, room=None)
    foresee(monkeypatch, peak=None)
    assert capsys.readouterr().out == ""


def test_the_least_time_of_a_known_chip_is_printed(monkeypatch, capsys):
    chip = programs.Chip(flops=1e6, hbm=10**9, bandwidth=1e11, links=1e10, pod=256)
    monkeypatch.setattr(programs, "chip_of", lambda device: chip)
    monkeypatch.setattr(programs, "model_flops", lambda jaxpr: 3.6e9)
    foresee(monkeypatch, peak=10**8)
    assert "estimate: at least 3.6e+06 ms a step, 10 hours to the end; 0.09 of 0.93 GiB" in capsys.readouterr().out


def test_a_signal_is_no_failure_of_the_compiler(monkeypatch):
    def stopped(lowered):
        raise hosts.Stopped(0, 15)

    monkeypatch.setattr(programs, "compiled", stopped)
    with pytest.raises(hosts.Stopped):
        foresee(monkeypatch, peak=0)
