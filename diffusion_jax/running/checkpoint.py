"""Checkpoints in Orbax's format.

A checkpoint is the training state as NumPy arrays, without a device axis. Random keys and the position in
the data are functions of the step and are not stored.
"""

import contextlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp  # noqa: TID251 (the only importer of Orbax)
import tensorstore  # Orbax writes with it
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import LatestN  # noqa: TID251

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running.workdir import absolute


@contextlib.contextmanager
def open_manager(
    workdir: epath.PathLike, keep: int = 3, read_only: bool = False, alone: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Opens Orbax's manager of the run's checkpoints; waits for the last save on exit.

    Args:
      keep: number of the latest checkpoints to keep.
      read_only: True writes and deletes nothing; a training run may be writing there.
      alone: True for a manager of process 0 that waits for no other process; the folder checkpoints/ must exist.

    Raises:
      UserError: the last save failed.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=LatestN(keep),
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
            manager.close()
        raise
    wait(manager)
    manager.close()


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copies the state, a pytree of arrays, and starts to write it as checkpoint `step`.

    Raises:
      UserError: the disk is full.
    """
    state = jax.tree.map(np.array, jax.device_get(state))
    check(manager)
    _check_room(manager, step, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(checksums(state)))
    with _saving(manager):
        manager.save(step, args=args)


def check(manager: ocp.CheckpointManager) -> None:
    """Raises UserError if a save has failed since the last check. Does not wait."""
    with _saving(manager):
        manager.check_for_errors()


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is on disk; raises UserError if it fails."""
    with _saving(manager):
        manager.wait_until_finished()
        manager.check_for_errors()


def restore(manager: ocp.CheckpointManager, like: Any, set_aside: bool = False) -> Any:
    """Returns the newest intact checkpoint as NumPy arrays, or None if there is no checkpoint.

    Reports newer checkpoints that are damaged.

    Args:
      like: the saved pytree's structure, with arrays or their shapes as leaves.
      set_aside: True renames damaged checkpoints to "damaged-<step>", so that the run can save those steps again.

    Raises:
      UserError: there are checkpoints but none can be read; nothing is renamed then.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _read(manager, step, like)
        except Exception as error:  # Orbax and tensorstore raise many types for a damaged file
            damaged[step] = one_line(error, 200) or type(error).__name__
            continue
        for bad, reason in damaged.items():
            print(f"checkpoint {bad} is damaged ({reason}): resuming from checkpoint {step}")
            if set_aside:
                _set_aside(manager, bad)
        return state
    if damaged:
        newest, reason = next(iter(damaged.items()))
        raise UserError(
            f"none of the checkpoints in {manager.directory} can be read (steps {', '.join(map(str, damaged))}; "
            f"{newest}: {reason}): restore them from a copy, or give another workdir; nothing was deleted"
        )
    return None


def checksums(state: Any) -> dict[str, int]:
    """Returns {path of a leaf: CRC-32 of its bytes}. Orbax has no checksums and restores a flipped bit silently."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data) for path, leaf in leaves
    }


def _read(manager, step, like):
    """Returns checkpoint `step`; raises an exception of any type if it is damaged."""
    _probe(manager.directory / str(step) / "state")
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksums=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    state, stored = restored["state"], restored["checksums"]
    actual = checksums(state)
    wrong = [path for path in actual.keys() | stored.keys() if actual.get(path) != stored.get(path)]
    if wrong:
        raise ValueError(f"the checksum of {min(wrong)} is wrong")
    if state.step != step:
        raise ValueError(f"it contains step {state.step}")
    return state


def _probe(folder):
    """Reads every value of the state's database, one by one, so that a damaged file raises one error.

    Orbax reads all leaves at once, and for a damaged file tensorstore's threads print hundreds of tracebacks.
    """
    base = f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder}/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = database.list().result()
    if not keys:
        raise ValueError("it contains no arrays")
    for key in keys:
        database.read(key).result()


def _set_aside(manager, step):
    """Renames checkpoint `step` to "damaged-<step>"."""
    if jax.process_index() == 0:
        old, new = manager.directory / str(step), manager.directory / f"damaged-{step}"
        if new.exists():
            new.rmtree()
        old.replace(new)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("set aside")
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
