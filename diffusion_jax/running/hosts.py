"""The machines of a run: the platform, the processes, the shared workdir, and signals that stop the run."""

import glob
import os
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import files

COMPILED = epath.Path("~/.cache/diffusion_jax/compiled")  # the compilation cache

# XLA flags that speed up the CPU, by version of jax, each measured (docs/performance.md). XLA ends the process at a
# flag that it does not know, so other versions get none.
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
_CPU_FLAGS = {"0.10": [_REDUCE], "0.12": [_REDUCE, "--xla_cpu_experimental_onednn_custom_call=true"]}

_EXTRAS = {"tpu": "tpu", "gpu": "cuda12", "cpu": "cpu"}  # extras of the package jax, by platform

# The other processes notice a dead process after this time, and exit.
_HEARTBEAT_SECONDS = 20


class Stopped(Exception):
    """Reports that a signal stopped the run after it saved its state."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # the shell's convention


def initialize(platform: str = "", coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Chooses the platform, sets the compilation cache and XLA's CPU flags, and joins the other processes.

    Call it before anything touches a device.

    Args:
      platform: "tpu", "gpu" or "cpu"; "" takes the best that JAX finds.
      coordinator: "host:port" of process 0; "" for a single process, or if the
        environment names it (Cloud TPU pods, Slurm, Open MPI).
      num_processes: the number of processes, with a coordinator.
      process_id: the number of this process, from 0, with a coordinator.

    Raises:
      UserError: the platform has no device, or the processes cannot connect.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR sets another
        jax.config.update("jax_compilation_cache_dir", str(COMPILED.expanduser()))
    os.environ["XLA_FLAGS"] = _with_cpu_flags(os.environ.get("XLA_FLAGS", ""), jax.__version__)
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    if coordinator and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be between 0 and {num_processes - 1} for --num_processes={num_processes}"
        )
    processes: dict[str, Any] = {}
    if coordinator:
        processes = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    on_tpu = bool(_accelerators()) and platform in ("", "tpu")
    if coordinator or _in_cluster() or on_tpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                **processes, initialization_timeout=120, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
            )
        except (RuntimeError, ValueError) as error:
            if coordinator or _in_cluster():
                raise UserError(
                    f"the processes cannot connect ({one_line(error, 300)}): check "
                    f"--coordinator={coordinator!r} and that every process is started"
                ) from None  # otherwise this is a single TPU machine, which belongs to no pod
    _check_devices(platform)
    if jax.process_count() > 1:  # Gloo waits only 30 s for the other processes, which may compile for longer
        multihost_utils.sync_global_devices("start")


def _with_cpu_flags(flags: str, version: str) -> str:
    """Returns XLA_FLAGS with the project's CPU flags; a flag that the user has set keeps its value."""
    cpu_flags = _CPU_FLAGS.get(".".join(version.split(".")[:2]), [])
    return " ".join([flags, *(flag for flag in cpu_flags if flag.partition("=")[0] not in flags)]).strip()


def _in_cluster():
    """Returns True if the environment variables describe several processes."""
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def _accelerators():
    """Returns the device files of Cloud TPU chips."""
    return glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")


def _check_devices(platform):
    """Raises UserError if JAX has no device of `platform`, or falls back to the CPU on a machine with TPU chips."""
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no plugin of the platform is installed
        line = one_line(error, 300) or "JAX is installed without support for it"
        remedy = f"check that this machine has one, and install jax[{_EXTRAS.get(platform, 'cuda12')}]"
        if "already in use" in line or "lockfile" in line:
            remedy = "end the process that holds the TPU; if there is no such process, remove /tmp/libtpu_lockfile"
        raise UserError(f"--platform={platform}: no device can be used ({line}): {remedy}") from None
    if platform and backend != platform:
        raise UserError(f"--platform={platform}: JAX found only {backend} devices: install jax[{_EXTRAS[platform]}]")
    if not platform and backend == "cpu" and _accelerators():
        raise UserError(
            f"this machine has a TPU ({_accelerators()[0]}), but JAX found only the CPU: pip install 'jax[tpu]', end "
            "the process that holds the TPU, or choose the CPU with --platform=cpu"
        )


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError in every process unless all processes see the same workdir."""
    if jax.process_count() == 1:
        return
    random = np.frombuffer(secrets.token_bytes(8), np.uint8)
    token = np.asarray(multihost_utils.broadcast_one_to_all(random)).tobytes().hex()
    file = workdir / ".shared"
    if jax.process_index() == 0:
        files.write_text(file, token)
    multihost_utils.sync_global_devices("written")
    visible = file.exists() and file.read_text() == token
    visible = np.asarray(multihost_utils.process_allgather(np.array([visible])))
    if not visible.all():
        raise UserError(
            f"--workdir={workdir} is not the same folder on all hosts (process {int(np.argmin(visible))} does not see "
            "the files of process 0): give a folder that all hosts share, e.g. gs://…"
        )


def on_process_0(function: Callable[[], None]) -> None:
    """Runs `function` in process 0, while the other processes wait.

    Raises:
      UserError: in the other processes, if `function` raised an error in process 0.
    """
    error = None
    if jax.process_index() == 0:
        try:
            function()
        except Exception as raised:  # any error must reach the other processes, which would wait for ever
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
        if failed and error is None:
            raise UserError("process 0 stopped with an error: see its message")
    if error is not None:
        raise error


class StopSignals:
    """Context that holds back SIGTERM and the first SIGINT until the training loop asks for them.

    A single process handles the signals itself; several processes agree on a step through JAX's
    preemption service. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        handlers = {signal.SIGINT: self._interrupt}
        if jax.process_count() == 1:
            handlers[signal.SIGTERM] = self._terminate
        try:
            self._previous_handlers = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        except ValueError:  # only the main thread may set handlers; a notebook's server runs cells in another
            self._previous_handlers = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def agreed(self, manager: Any, step: int) -> int | None:
        """Returns the signal if all processes stop after `step`, else None. Every process calls it at every step.

        Args:
          manager: the Orbax checkpoint manager, which knows the preemption service; unused by a single process.
          step: the step that has just been started.
        """
        if jax.process_count() > 1:
            return signal.SIGTERM if manager.reached_preemption(step) else None
        return self.signum

    def _terminate(self, signum, _):
        self.signum = signum

    def _interrupt(self, signum, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step; press Ctrl-C again to end at once", file=sys.stderr)
        if jax.process_count() == 1:
            self.signum = signum
        else:
            os.kill(os.getpid(), signal.SIGTERM)
