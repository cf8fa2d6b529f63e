"""The machines of a run: which platform, how many processes, and when they are told to stop."""

import glob
import os
import secrets
import signal
import sys

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError, one_line

COMPILED = epath.Path("~/.cache/diffusion_jax/compiled")  # programs, for the next start

# What makes XLA faster on the CPU, and has been measured to, by version of jax (docs/performance.md). It ends the
# process at a flag that it does not know, so other versions get none.
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
_CPU_FLAGS = {"0.10": [_REDUCE], "0.12": [_REDUCE, "--xla_cpu_experimental_onednn_custom_call=true"]}

# A dead peer is noticed after this time, and the others end.
_HEARTBEAT_SECONDS = 20


class Stopped(Exception):
    """The run was told to stop, and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum  # as the shell has it


def initialize(platform: str = "", coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Chooses the platform, keeps compiled programs in COMPILED, sets XLA's CPU flags, joins the other processes.

    Call it before anything touches a device.

    Args:
      platform: "tpu", "gpu", "cpu", or "" for the best that there is.
      coordinator: "host:port" of process 0; "" where there is one process, or where the
        environment knows (Cloud TPU pods, Slurm, Open MPI).
      num_processes, process_id: with a coordinator, how many, and which one this is.

    Raises:
      UserError: no such device, or the processes do not find each other.
    """
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR sets another
        jax.config.update("jax_compilation_cache_dir", str(COMPILED.expanduser()))
    os.environ["XLA_FLAGS"] = _with_cpu_flags(os.environ.get("XLA_FLAGS", ""), jax.__version__)
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    if coordinator and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be one of 0 to --num_processes={num_processes} - 1, with --coordinator"
        )
    known = {}
    if coordinator:
        known = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    on_tpu = bool(_accelerators()) and platform in ("", "tpu")
    if coordinator or _in_cluster() or on_tpu:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(
                **known, initialization_timeout=120, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
            )
        except (RuntimeError, ValueError) as error:
            if coordinator or _in_cluster():
                raise UserError(
                    f"the processes do not find each other ({one_line(error, 300)}): check "
                    f"--coordinator={coordinator!r} and that every process is started"
                ) from None  # else a TPU that belongs to no pod
    _check_devices(platform)
    if jax.process_count() > 1:  # Gloo waits 30 s for its peers, less than they may need to compile
        multihost_utils.sync_global_devices("start")


def _with_cpu_flags(given: str, version: str) -> str:
    """XLA_FLAGS with ours for the CPU; a flag that is given, with whatever value, stays as it is."""
    ours = _CPU_FLAGS.get(".".join(version.split(".")[:2]), [])
    return " ".join([given, *(flag for flag in ours if flag.partition("=")[0] not in given)]).strip()


def _in_cluster():
    """Whether the environment says that this is one of several processes."""
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def _accelerators():
    """The device files of Cloud TPU chips."""
    return glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")


def _check_devices(platform):
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where no plugin of the platform is installed
        line = one_line(error, 300) or "no support for it is installed"
        mend = f"check that this machine has one, and install jax[{'tpu' if platform == 'tpu' else 'cuda12'}]"
        if "already in use" in line or "lockfile" in line:
            mend = "end the process that holds it, or remove /tmp/libtpu_lockfile if there is none"
        raise UserError(f"--platform={platform}: no device can be used ({line}): {mend}") from None
    if platform and found != platform:
        raise UserError(f"--platform={platform}: JAX has found {found} devices alone: install jax[{platform}]")
    if not platform and found == "cpu" and _accelerators():
        raise UserError(
            f"{_accelerators()[0]} is there, but JAX has found the CPU alone: pip install 'jax[tpu]', end the process "
            "that holds the TPU, or ask for the CPU with --platform=cpu"
        )


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError, in every process, unless all of them see one and the same workdir."""
    if jax.process_count() == 1:
        return
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    token = np.asarray(multihost_utils.broadcast_one_to_all(token)).tobytes().hex()
    file = workdir / ".shared"
    if jax.process_index() == 0:
        file.write_text(token)
    multihost_utils.sync_global_devices("written")
    seen = file.exists() and file.read_text() == token
    all_seen = np.asarray(multihost_utils.process_allgather(np.array([seen])))
    if not all_seen.all():
        raise UserError(
            f"--workdir={workdir} is not the same folder on all hosts (process {int(np.argmin(all_seen))} does not see "
            "what process 0 writes): give one that all share, e.g. gs://…"
        )


class StopSignals:
    """Context in which SIGTERM, and the first SIGINT, are kept for the loop to ask for.

    One process keeps them itself; several agree on the step through JAX's preemption service.
    A second SIGINT ends the process at once.
    """

    def __init__(self):
        self.signum = None
        self._before = {}

    def __enter__(self):
        catch = {signal.SIGINT: self._interrupt}
        if jax.process_count() == 1:
            catch[signal.SIGTERM] = self._terminate
        try:
            self._before = {signum: signal.signal(signum, handler) for signum, handler in catch.items()}
        except ValueError:  # not in the main thread, e.g. of a notebook's server: signals are not ours
            self._before = {}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def agreed(self, manager, step: int) -> int | None:
        """The signal, if all processes are to stop after `step`. Every process must ask for every step."""
        if jax.process_count() > 1:
            return signal.SIGTERM if manager.reached_preemption(step) else None
        return self.signum

    def _terminate(self, signum, _):
        self.signum = signum

    def _interrupt(self, signum, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step; once more ends at once", file=sys.stderr)
        if jax.process_count() == 1:
            self.signum = signum
        else:
            os.kill(os.getpid(), signal.SIGTERM)
