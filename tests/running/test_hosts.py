import os
import signal
import sys
import types

import jax
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.running import hosts


def test_signals_wait_for_the_training_loop():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with hosts.StopSignals() as signals:
        assert signals.agreed(None, 1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed(None, 2) == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_lost_terminal_stops_the_run_as_sigterm_does_unless_nohup_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        with hosts.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.agreed(None, 2) == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with hosts.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.agreed(None, 2) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_the_process_at_once(capsys):
    with hosts.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(None, 1) == signal.SIGINT
        assert "press Ctrl-C again to end at once" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_second_interrupt_leaves_a_notebook_its_kernel(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with hosts.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(None, 1) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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
def test_cluster_from_the_environment(monkeypatch, variables, several):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._in_cluster() == several


def test_a_missing_platform_is_an_error():
    with pytest.raises(UserError, match=r"--platform=tpu: JAX found only cpu devices: install jax\[tpu\]"):
        hosts._check_devices("tpu")
    with pytest.raises(UserError, match=r"--platform=gpu: JAX found only cpu devices: install jax\[cuda12\]"):
        hosts._check_devices("gpu")
    hosts._check_devices("cpu")
    hosts._check_devices("")


@pytest.mark.parametrize(
    "device, vendor_file, vendor, found",
    [
        ("dev/accel0", "sys/class/accel/accel0/device/vendor", "0x1ae0", True),
        ("dev/accel0", None, None, True),  # no /sys in the container
        ("dev/accel0", "sys/class/accel/accel0/device/vendor", "0x8086", False),
        ("dev/accel/accel0", "sys/class/accel/accel0/device/vendor", "0x8086", False),  # a laptop's NPU
        ("dev/vfio/5", "sys/kernel/iommu_groups/5/devices/0000:00:05.0/vendor", "0x1ae0", True),
        ("dev/vfio/5", "sys/kernel/iommu_groups/5/devices/0000:00:05.0/vendor", "0x10de", False),
        ("dev/vfio/vfio", None, None, False),
    ],
)
def test_only_googles_accelerators_are_tpus(tmp_path, device, vendor_file, vendor, found):
    for file, text in ((device, ""), (vendor_file, vendor)):
        if file:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(f"{text}\n")
    assert hosts._accelerators(tmp_path) == ([str(tmp_path / device)] if found else [])


def test_processes_that_were_started_differently_are_refused(monkeypatch):
    asked = {"--seed": 0, "config.train.num_steps": 10}
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, mine, mine | {"config.train.num_steps": "20"}])
    with pytest.raises(UserError, match=r"\(config.train.num_steps: 10 in process 0, 20 in process 2\): give all "):
        hosts.check_same(asked)
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, mine])
    hosts.check_same(asked)


def test_a_tpu_machine_never_uses_its_cpu_silently(monkeypatch):
    monkeypatch.setattr(hosts, "_accelerators", lambda: ["/dev/accel0"])
    with pytest.raises(UserError, match=r"has a TPU \(/dev/accel0\), but JAX found only the CPU.*--platform=cpu"):
        hosts._check_devices("")
    hosts._check_devices("cpu")


def test_a_tpu_in_use_is_an_error(monkeypatch):
    def busy():
        raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process 17.")

    monkeypatch.setattr(hosts.jax, "default_backend", busy)
    with pytest.raises(UserError, match=r"already in use by process 17.*end the process .*libtpu_lockfile"):
        hosts._check_devices("tpu")


def test_a_process_id_beyond_the_number_of_processes():
    with pytest.raises(UserError, match=r"--process_id=2 must be between 0 and 1 for --num_processes=2"):
        hosts.initialize(coordinator="127.0.0.1:1", num_processes=2, process_id=2)


def test_cpu_flags_only_for_versions_of_jax_that_know_them():
    reduce, level = "--xla_cpu_experimental_ynn_fusion_type", "--xla_backend_optimization_level"
    assert hosts._with_cpu_flags("", "0.10.2", True) == f"{reduce}=LIBRARY_FUSION_TYPE_REDUCE {level}=1"
    assert hosts._with_cpu_flags("--a=1", "0.12.0.1", True) == f"--a=1 {reduce}=LIBRARY_FUSION_TYPE_REDUCE {level}=1"
    assert hosts._with_cpu_flags(f"{reduce}= {level}=3", "0.12.0", True) == f"{reduce}= {level}=3"
    assert hosts._with_cpu_flags("--a=1", "0.11.3", True) == "--a=1"
    assert hosts._with_cpu_flags("", "0.100.0", True) == ""


def test_beside_an_accelerator_its_compiler_keeps_its_level():
    assert "level" not in hosts._with_cpu_flags("", "0.12.0", False)


def test_freed_memory_is_kept_unless_the_user_says_how_memory_is_allocated(monkeypatch):
    calls = []
    glibc = types.SimpleNamespace(mallopt=lambda *args: calls.append(args))
    monkeypatch.setattr(hosts.ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(hosts.sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    hosts._keep_freed_memory()
    assert calls == [(-3, 256 * 2**20), (-1, 512 * 2**20)]
    for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            hosts._keep_freed_memory()
    with monkeypatch.context() as patch:
        patch.setattr(hosts.sys, "platform", "darwin")
        hosts._keep_freed_memory()
    del glibc.mallopt  # as in musl
    hosts._keep_freed_memory()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "platforms, tpus, plugin, expected",
    [
        ("cpu", ["/dev/accel0"], True, False),
        ("cuda", [], False, True),
        ("", ["/dev/accel0"], False, True),
        ("", [], False, False),
    ],
)
def test_an_accelerator_is_expected_without_starting_a_backend(platforms, tpus, plugin, expected, monkeypatch):
    monkeypatch.setattr(hosts, "_accelerators", lambda: tpus)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: plugin or None)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        assert hosts.expects_accelerator() == expected
    finally:
        jax.config.update("jax_platforms", before)
