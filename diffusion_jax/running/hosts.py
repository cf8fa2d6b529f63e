"""The machines of a run: the platform, the processes, the shared workdir, and signals that stop the run."""

import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import files

COMPILED = epath.Path("~/.cache/diffusion_jax/compiled")  # the compilation cache

# XLA flags that speed up the CPU, and the versions of jax on which they were measured (docs/performance.md). XLA ends
# the process at a flag that it does not know, so other versions get none.
_REDUCE = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
_LEVEL = "--xla_backend_optimization_level=1"  # LLVM's later passes made no step faster; GPUs heed this flag too
_MEASURED = ("0.10", "0.12")

# Parameters of glibc's mallopt, by their numbers in malloc.h, in bytes. M_MMAP_THRESHOLD: the kernel gets a block of
# this size back when it is freed. M_TRIM_THRESHOLD: so much free memory is kept.
_MALLOC = {-3: 256 * 2**20, -1: 512 * 2**20}

_EXTRAS = {"tpu": "tpu", "gpu": "cuda12", "cpu": "cpu"}  # extras of the package jax, by platform

_GOOGLE = "0x1ae0"  # the PCI vendor of TPUs

# The other processes notice a dead process after this time, and exit.
_HEARTBEAT_SECONDS = 20


class Stopped(BaseException):
    """Reports that a signal stopped the run after it saved the state of `step`. No handler of errors holds it up."""

    def __init__(self, step: int, signum: int) -> None:
        saved = f"after step {step}, which is saved" if step else "before its first step"
        super().__init__(f"stopped by a signal {saved}: run the same command to resume")
        self.exit_code = 128 + signum  # the shell's convention


def silence_libraries() -> None:
    """Leaves errors to the command line: Orbax's threads print 1,600 lines for a full disk."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):  # a failed save has already raised its error
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def initialize(platform: str = "", coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Chooses the platform, sets the compilation cache and what speeds up a CPU, and joins the other processes.

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
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = _with_cpu_flags(flags, jax.__version__, not expects_accelerator())
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
    if jax.default_backend() == "cpu":
        _keep_freed_memory()
    if jax.process_count() > 1:  # Gloo waits only 30 s for the other processes, which may compile for longer
        multihost_utils.sync_global_devices("start")


def _with_cpu_flags(flags: str, version: str, is_alone: bool) -> str:
    """Returns XLA_FLAGS with the project's CPU flags; a flag that the user has set keeps its value.

    `is_alone` says that the machine has no accelerator.
    """
    is_measured = ".".join(version.split(".")[:2]) in _MEASURED
    cpu_flags = [_REDUCE] * is_measured + [_LEVEL] * (is_measured and is_alone)
    return " ".join([flags, *(flag for flag in cpu_flags if flag.partition("=")[0] not in flags)]).strip()


def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of a step for the next one; the kernel would clear all of its pages for each step.

    Does nothing without glibc, or where the user has set how it allocates.
    """
    if sys.platform != "linux" or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in _MALLOC.items():
            library.mallopt(parameter, value)


def _in_cluster():
    """Returns True if the environment variables describe several processes."""
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def expects_accelerator() -> bool:
    """True if JAX will probably find a TPU or a GPU. Starts no backend, which has to wait for `initialize`."""
    if platforms := getattr(jax.config, "jax_platforms", None):
        return platforms.split(",")[0] != "cpu"
    plugins = [("dev/nvidia[0-9]*", "jax_cuda12_plugin"), ("dev/nvidia[0-9]*", "jax_cuda13_plugin")]
    plugins += [("dev/kfd", "jax_rocm7_plugin"), ("dev/kfd", "jax_rocm60_plugin")]
    has_gpu = any(importlib.util.find_spec(name) and any(Path("/").glob(files)) for files, name in plugins)
    return has_gpu or bool(_accelerators())


def _accelerators(root="/"):
    """Returns the device files of Cloud TPU chips. Those that say another vendor are a laptop's NPU or a GPU."""
    chips = []
    for devices, vendors in (
        ("dev/accel[0-9]*", "sys/class/accel/{}/device/vendor"),
        ("dev/vfio/[0-9]*", "sys/kernel/iommu_groups/{}/devices/*/vendor"),
    ):
        for device in sorted(Path(root).glob(devices)):
            named = [vendor.read_text().strip() for vendor in Path(root).glob(vendors.format(device.name))]
            if not named or _GOOGLE in named:
                chips.append(str(device))
    return chips


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


def gather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in their order. All processes call it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value, default=str).encode()  # of no type may fail here, while the others wait
    size = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(size), np.uint8))
    return [json.loads(np.asarray(row).tobytes()) for row in rows]


def on_main(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0, and returns its JSON value in all processes. All processes call it.

    Raises:
      Exception: what the function raises in process 0; a UserError with its message in the others, which would wait
        for ever otherwise.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    if jax.process_index() == 0:
        try:
            value = function()
        except Exception as raised:
            error = raised
    value, reason = gather([value, error and (one_line(error) or type(error).__name__)])[0]
    if error is not None:
        raise error
    if reason:
        raise UserError(reason)
    return value


def check_same(settings: Mapping[str, Any]) -> None:
    """Raises UserError in every process, naming the keys, unless all processes were given the same settings."""
    all_settings = gather({key: str(value) for key, value in settings.items()})
    for number, others in enumerate(all_settings):
        differing = [
            f"{key}: {all_settings[0].get(key)} in process 0, {others.get(key)} in process {number}"
            for key in sorted(all_settings[0].keys() | others.keys())
            if all_settings[0].get(key) != others.get(key)
        ]
        if differing:
            raise UserError(
                f"the processes were started differently ({', '.join(differing)}): give all the same command"
            )


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError in every process unless all processes see the same workdir."""
    if jax.process_count() == 1:
        return
    file, token = workdir / ".shared", gather(secrets.token_hex(8))[0]
    on_main(lambda: files.write_text(file, token))
    visible = gather(file.exists() and file.read_text() == token)
    if not all(visible):
        raise UserError(
            f"--workdir={workdir} is not the same folder on all hosts (process {visible.index(False)} does not see "
            "the files of process 0): give a folder that all hosts share, e.g. gs://…"
        )


class StopSignals:
    """Context that holds back SIGTERM, SIGHUP and the first SIGINT until the training loop asks for them.

    A single process handles the signals itself; several processes agree on a step through JAX's
    preemption service. A second SIGINT ends the process at once; in a notebook or an interactive session it raises
    KeyboardInterrupt instead, which leaves the session its variables. nohup's choice to ignore SIGHUP stands.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._saved: int | None = None  # the step whose state is all there is to save, inside `at_once`
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        handlers: dict[signal.Signals, Callable] = {signal.SIGINT: self._interrupt}
        if jax.process_count() == 1:
            handlers[signal.SIGTERM] = self._terminate
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._terminate
        try:
            self._previous_handlers = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        except ValueError:  # only the main thread may set handlers; a notebook's server runs cells in another
            self._previous_handlers = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def at_once(self, step: int) -> Iterator[None]:
        """Lets a signal raise Stopped inside the block, in a single process; the state of `step` is saved by then.

        For work that takes long and changes no state: it compiles, draws or measures.
        """
        self._saved = step
        try:
            if self.signum:
                raise Stopped(step, self.signum)
            yield
        finally:
            self._saved = None

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
        if jax.process_count() == 1:
            self.signum = signum
            if self._saved is not None:
                raise Stopped(self._saved, signum)
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service knows

    def _interrupt(self, signum, frame):
        is_interactive = hasattr(sys, "ps1")  # IPython sets it too
        signal.signal(signal.SIGINT, signal.default_int_handler if is_interactive else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(
                "\nstopping after this step; press Ctrl-C again to end at once" if self._saved is None else "",
                file=sys.stderr,
            )
        self._terminate(signum, frame)
