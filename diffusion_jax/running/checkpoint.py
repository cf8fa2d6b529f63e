"""Checkpoints in Orbax's format.

A checkpoint is the training state as NumPy arrays, without a device axis, a checksum of each array, and what the
caller wants to know about it. Random keys and the position in the data are functions of the step and are not stored.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import re
import shutil
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp  # noqa: TID251 (the only importer of Orbax)
import tensorstore  # Orbax writes with it
from etils import epath

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import hosts, watch
from diffusion_jax.running.workdir import absolute

# {manager: the start of its last save}. Checksums and Orbax's own part take as long as hundreds of steps, so a single
# process starts saves in a thread. Several processes do not: Orbax's collectives would mix with those of the steps.
_starts: weakref.WeakKeyDictionary[Any, concurrent.futures.Future] = weakref.WeakKeyDictionary()
_starter = concurrent.futures.ThreadPoolExecutor(1)
_LOOKS = 20  # times that a reader looks again, because the checkpoint that it read was replaced


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Orbax's policy that keeps the newest checkpoint, and the last `keep` of those at multiples of `every`.

    The checkpoints in between, before a grid or after a signal, do not push out the others.
    """

    keep: int
    every: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {steps[-1], *[step for step in steps if step % self.every == 0][-self.keep :]}
        return [step in kept for step in steps]


@contextlib.contextmanager
def open_manager(
    workdir: epath.PathLike, keep: int = 3, every: int = 1, read_only: bool = False, alone: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Opens Orbax's manager of the run's checkpoints; waits for the last save on exit.

    Args:
      keep: number of checkpoints to keep, of those whose step is a multiple of `every`; the newest is kept too.
      read_only: True writes and deletes nothing; a training run may be writing there.
      alone: True for a manager of process 0 that waits for no other process; the folder checkpoints/ must exist.

    Raises:
      UserError: the last save failed.
    """
    with _without_warnings() if read_only else contextlib.nullcontext():
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Ring(keep, every),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not alone,
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0} if alone else None),
        )
        manager = ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            _await_start(manager)
        with contextlib.suppress(Exception):
            manager.close()
        raise
    wait(manager)
    manager.close()


@contextlib.contextmanager
def _without_warnings():
    """Holds back Orbax's warnings, that a reader is read-only or that a save has waited: notebooks show them."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def save(manager: ocp.CheckpointManager, step: int, state: Any, about: dict[str, Any] | None = None) -> None:
    """Copies the state, a NamedTuple of pytrees of arrays, and starts to write it as checkpoint `step`.

    Args:
      about: what `read_about` returns; JSON values.

    Raises:
      UserError: the disk is full.
    """
    state = jax.tree.map(np.array, jax.device_get(state))
    with _saving(manager):
        _await_start(manager)
    check(manager)
    _check_room(manager, step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    if jax.process_count() == 1:
        _starts[manager] = _starter.submit(_start, manager, step, state, about)
    else:
        with _saving(manager):
            _start(manager, step, state, about)


def _start(manager, step, state, about):
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        checksums=ocp.args.JsonSave(checksums(state)),
        about=ocp.args.JsonSave(about or {}),
    )
    with _without_warnings():
        manager.save(step, args=args)


def _await_start(manager):
    """Waits until the last save has started; raises its error."""
    if start := _starts.pop(manager, None):
        start.result()


def verify(manager: ocp.CheckpointManager, step: int, like: Any) -> None:
    """Waits for checkpoint `step`, which was just saved, and reads it back.

    Raises:
      UserError: it cannot be read. A later one could not either.
    """
    wait(manager)
    try:
        _read(manager, step, like, "verifying")
    except _Damaged as error:
        raise UserError(
            f"checkpoint {step} was written to {manager.directory}, but cannot be read back ({error}): give a workdir "
            "on another disk or under another name"
        ) from None


def check(manager: ocp.CheckpointManager) -> None:
    """Raises UserError if a save has failed since the last check. Does not wait."""
    start = _starts.get(manager)
    if start is None or start.done():
        with _saving(manager):
            _await_start(manager)
            manager.check_for_errors()


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is on disk; raises UserError if it fails."""

    def finish():
        _await_start(manager)
        manager.wait_until_finished()

    with _saving(manager):
        watch.waiting("writing the checkpoint", finish)
        manager.check_for_errors()


def restore_step(manager: ocp.CheckpointManager, like: Any, step: int) -> Any:
    """Returns checkpoint `step` as NumPy arrays, see `restore`.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    if step not in (steps := sorted(manager.all_steps())):
        there = f"has those of steps {', '.join(map(str, steps))}" if steps else "has none yet"
        raise UserError(f"--step={step}: there is no such checkpoint; {manager.directory} {there}")
    try:
        return _read(manager, step, like)
    except _Damaged as error:
        raise UserError(f"--step={step}: checkpoint {step} cannot be read ({error}): give another step") from None


def restore(manager: ocp.CheckpointManager, like: Any, set_aside: bool = False) -> Any:
    """Returns the newest intact checkpoint as NumPy arrays, or None if there is no checkpoint.

    Reports newer checkpoints that are damaged. Several processes decide together which are. If a training replaces a
    checkpoint while it is read, the newest is looked for again.

    Args:
      like: the saved NamedTuple's structure, with arrays or their shapes as leaves. A field that is None is not read.
        A field that the checkpoint was saved without is None in the result.
      set_aside: True renames damaged checkpoints to "damaged-<step>", so that the run can save those steps again.

    Raises:
      UserError: there are checkpoints but none can be read; nothing is renamed then.
    """
    for _ in range(_LOOKS):
        damaged: dict[int, str] = {}
        steps = sorted(manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = _read(manager, step, like)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, reason in damaged.items():
                if hosts.on_main((manager.directory / str(bad)).exists):
                    print(f"checkpoint {bad} is damaged ({reason}): resuming from checkpoint {step}")
                    if set_aside:
                        _set_aside(manager, bad)
            return state
        if not damaged:
            return None
        if set_aside:  # the training itself
            break
        time.sleep(1)  # a training deletes the files of a checkpoint one by one
        manager.reload()
        if sorted(manager.all_steps(), reverse=True) == steps:
            break
    newest, reason = next(iter(damaged.items()))
    raise UserError(
        f"none of the checkpoints in {manager.directory} can be read (steps {', '.join(map(str, damaged))}; "
        f"{newest}: {reason}): restore them from a copy, or give another workdir; nothing was deleted"
    )


def read_about(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Returns what `save` was told about checkpoint `step`; {} for a checkpoint of an earlier version."""
    try:
        return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    except (OSError, KeyError, ValueError):
        return {}


def checksums(state: Any) -> dict[str, int]:
    """Returns {path of a leaf: CRC-32 of its bytes}. Orbax has no checksums and restores a flipped bit silently."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data) for path, leaf in leaves
    }


class _Damaged(Exception):
    """Reports that a checkpoint cannot be read, in one process or in another."""


def _read(manager, step, like, doing="reading"):
    """Returns checkpoint `step`; raises _Damaged in all processes if one of them cannot read it."""
    return watch.waiting(f"{doing} checkpoint {step}", lambda: _read_quietly(manager, step, like))


def _read_quietly(manager, step, like):
    item = {name: value for name, value in like._asdict().items() if value is not None}
    wanted = {f".{name}" for name in item}
    with _damage_in_any_process():
        there = _probe(manager.directory / str(step) / "state", set(item))
    with _damage_in_any_process():
        item = {name: value for name, value in item.items() if name in there}
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        restored = manager.restore(step, args=ocp.args.Composite(state=args, checksums=ocp.args.JsonRestore()))
        state = type(like)(**(dict.fromkeys(like._fields) | restored["state"]))
        actual, stored = checksums(state), restored["checksums"]
        expected = {path: crc for path, crc in stored.items() if re.match(r"\.\w+", path)[0] in wanted}
        wrong = [path for path in actual.keys() | expected.keys() if actual.get(path) != expected.get(path)]
        if wrong:
            raise ValueError(f"the checksum of {min(wrong)} is wrong")
        if state.step != step:
            raise ValueError(f"it contains step {state.step}")
    return state


@contextlib.contextmanager
def _damage_in_any_process():
    """Turns an error of any process, of any type, into _Damaged in all processes."""
    reason = ""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many types for a damaged file
        reason = one_line(error, 200) or type(error).__name__
    if reason := next(filter(None, hosts.gather(reason)), ""):
        raise _Damaged(reason)


def _probe(folder, names):
    """Reads every value of some fields of the state's database, and returns the names of all fields in it.

    The values are read one by one, so that a damaged file raises one error. Orbax reads all leaves at once, and for a
    damaged file tensorstore's threads print hundreds of tracebacks.
    """
    base = f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder}/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = database.list().result()
    if not keys:
        raise ValueError("it contains no arrays")
    fields = [re.match(r"[^./]+", key.decode())[0] for key in keys]  # "ema_params.conv_in.kernel/0.0"
    for key, field in zip(keys, fields, strict=True):
        if field in names:
            database.read(key).result()
    return {*fields}


def _set_aside(manager, step):
    """Renames checkpoint `step` to "damaged-<step>"."""

    def rename():
        old, new = manager.directory / str(step), manager.directory / f"damaged-{step}"
        if new.exists():
            new.rmtree()
        old.replace(new)

    hosts.on_main(rename)
    manager.reload()


@contextlib.contextmanager
def _saving(manager):
    """Turns any error of a save into a UserError."""
    try:
        yield
    except Exception as error:  # Orbax raises its own, tensorstore's and the system's
        reason = one_line(error, 500)
        raise UserError(
            f"a checkpoint cannot be written in {manager.directory} ({reason}): make room or fix the permissions, "
            f"and run again; {_last(manager)}"
        ) from error


def _check_room(manager, step, num_bytes):
    """Raises UserError if the disk is too full: the oldest checkpoint is deleted only after the newest is written."""
    if "://" in str(manager.directory):
        return
    free = shutil.disk_usage(manager.directory).free
    needed = 1.05 * num_bytes + 1e6  # Orbax's own files are small
    if free < needed:
        raise UserError(
            f"the checkpoint of step {step} needs {needed / 1e6:.1f} MB, but {manager.directory} has "
            f"{free / 1e6:.1f} MB free: make room, and run again; {_last(manager)}"
        )


def _last(manager):
    step = manager.latest_step()
    return "no checkpoint has been written yet" if step is None else f"the last checkpoint is of step {step}"
