import os
import signal

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.running import hosts


def test_signals_are_kept_for_the_loop():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with hosts.StopSignals() as signals:
        assert signals.agreed(None, 1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed(None, 2) == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_ends_at_once(capsys):
    with hosts.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(None, 1) == signal.SIGINT
        assert "once more ends at once" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(
    "variables, several",
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_what_the_environment_says(monkeypatch, variables, several):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._in_cluster() == several


def test_a_platform_that_is_not_there():
    with pytest.raises(UserError, match=r"--platform=tpu: JAX has found cpu devices alone: install jax\[tpu\]"):
        hosts._check_devices("tpu")
    hosts._check_devices("cpu")
    hosts._check_devices("")


def test_never_silently_on_the_cpu_of_a_tpu_machine(monkeypatch):
    monkeypatch.setattr(hosts, "_accelerators", lambda: ["/dev/accel0"])
    with pytest.raises(UserError, match=r"/dev/accel0 is there, but JAX has found the CPU alone.*--platform=cpu"):
        hosts._check_devices("")
    hosts._check_devices("cpu")


def test_a_held_tpu(monkeypatch):
    def busy():
        raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 17.")

    monkeypatch.setattr(hosts.jax, "default_backend", busy)
    with pytest.raises(UserError, match=r"already in use by process 17.*end the process .*libtpu_lockfile"):
        hosts._check_devices("tpu")


def test_a_process_that_is_one_too_many():
    with pytest.raises(UserError, match=r"--process_id=2 must be one of 0 to --num_processes=2 - 1"):
        hosts.initialize(coordinator="127.0.0.1:1", num_processes=2, process_id=2)


def test_flags_of_the_cpu_are_for_versions_that_know_them():
    reduce, onednn = "--xla_cpu_experimental_ynn_fusion_type", "--xla_cpu_experimental_onednn_custom_call"
    assert hosts._with_cpu_flags("", "0.10.2") == f"{reduce}=LIBRARY_FUSION_TYPE_REDUCE"
    assert hosts._with_cpu_flags("--a=1", "0.12.0.1") == f"--a=1 {reduce}=LIBRARY_FUSION_TYPE_REDUCE {onednn}=true"
    assert hosts._with_cpu_flags(f"{reduce}= {onednn}=false", "0.12.0") == f"{reduce}= {onednn}=false"
    assert hosts._with_cpu_flags("--a=1", "0.11.3") == "--a=1"
    assert hosts._with_cpu_flags("", "0.100.0") == ""
