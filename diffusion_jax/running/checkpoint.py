"""The workdir of a run: its config, and its checkpoints in Orbax's format.

    config.json · checkpoints/<step>/ · metrics.jsonl · samples/<step>.png · TensorBoard events

A checkpoint is the training state as NumPy arrays, with no device axis, no random key and
no position in the data: all that is a function of the step.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp  # noqa: TID251 (the room of Orbax)
import tensorstore  # what Orbax writes with
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict  # noqa: TID251 (config.json)
from orbax.checkpoint.checkpoint_managers import LatestN  # noqa: TID251

from diffusion_jax.errors import UserError, one_line


def write_config(workdir, config: ConfigDict) -> None:
    """Writes config.json, making the workdir where it is missing.

    Raises:
      UserError: the workdir cannot be written.
    """
    workdir = absolute(workdir)
    partial = workdir / "config.json.partial"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error}): give another folder") from None


def read_config(workdir) -> ConfigDict | None:
    """The config of the run in `workdir`, None where there is no run.

    Raises:
      UserError: config.json is not JSON.
    """
    file = absolute(workdir) / "config.json"
    if not file.exists():
        return None
    try:
        return ConfigDict(json.loads(file.read_text())).lock()
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it, or give another workdir") from None


@contextlib.contextmanager
def open_manager(workdir, keep: int = 3, read_only: bool = False) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of the run's checkpoints, which on leaving waits for the last save.

    Args:
      keep: how many of the latest checkpoints stay.
      read_only: touch nothing: a training run may be writing there.

    Raises:
      UserError: the last save failed.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=LatestN(keep), cleanup_tmp_directories=not read_only, read_only=read_only
    )
    manager = ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # what happened first is what the user is told
            manager.close()
        raise
    wait(manager)
    manager.close()


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts to write the state (a pytree of arrays) as checkpoint `step`; copies it first.

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
    """Raises UserError if a save that was started has failed meanwhile. Costs nothing."""
    with _saving(manager):
        manager.check_for_errors()


def wait(manager: ocp.CheckpointManager) -> None:
    """Returns when what was started to be saved is on disk; raises UserError if it cannot be."""
    with _saving(manager):
        manager.wait_until_finished()
        manager.check_for_errors()


def restore(manager: ocp.CheckpointManager, like, set_aside: bool = False):
    """The newest checkpoint that is whole, as NumPy arrays; None where there is none at all.

    Newer ones that are damaged are said to be so.

    Args:
      like: a pytree of arrays, or of their shapes, as it was saved.
      set_aside: rename what is damaged to "damaged-<step>", out of the way of the steps to come.

    Raises:
      UserError: there are checkpoints, and none can be read; nothing is renamed then.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _read(manager, step, like)
        except Exception as error:  # whatever Orbax and tensorstore make of a damaged file
            damaged[step] = one_line(error, 200) or type(error).__name__
            continue
        for bad, reason in damaged.items():
            print(f"checkpoint {bad} is damaged ({reason}): going on from checkpoint {step}")
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


def checksums(state) -> dict[str, int]:
    """{path of a leaf: CRC-32 of its bytes}: Orbax has none, and would restore a flipped bit in silence."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8)) for path, leaf in leaves}


def _read(manager, step, like):
    _probe(manager.directory / str(step) / "state", len(jax.tree.leaves(like)))
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksums=ocp.args.JsonRestore())
    found = manager.restore(step, args=args)
    state, stored = found["state"], found["checksums"]
    actual = checksums(state)
    wrong = [path for path in actual.keys() | stored.keys() if actual.get(path) != stored.get(path)]
    if wrong:
        raise ValueError(f"the checksum of {min(wrong)} is wrong")
    if state.step != step:
        raise ValueError(f"it is of step {state.step}")
    return state


def _probe(folder, num_arrays):
    """Reads every value of the state's database once, one by one, and counts its arrays.

    Where a file is damaged this raises one error; Orbax reads all leaves at a time, and
    hundreds of tracebacks come from tensorstore's threads.
    """
    base = str(folder) if "://" in str(folder) else f"file://{folder}"
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result()
    keys = database.list().result()
    found = sum(key.endswith(b"/.zarray") for key in keys)
    if found != num_arrays:
        raise ValueError(f"it holds {found} of {num_arrays} arrays")
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
    """Turns what goes wrong with a save into one line."""
    try:
        yield
    except Exception as error:  # Orbax raises its own, tensorstore's and the system's
        reason = one_line(error, 500)
        raise UserError(
            f"a checkpoint cannot be written in {manager.directory} ({reason}): make room or mend the rights, and run "
            f"again; {_last(manager)}"
        ) from error


def _check_room(manager, step, num_bytes):
    """Before, not while, a checkpoint is written: the oldest is deleted only when the newest is there."""
    if "://" in str(manager.directory):
        return
    free = shutil.disk_usage(manager.directory).free
    needed = 1.05 * num_bytes + 1e6  # Orbax's own files are small
    if free < needed:
        raise UserError(
            f"the checkpoint of step {step} needs {needed / 1e6:.1f} MB, and {manager.directory} has "
            f"{free / 1e6:.1f} MB free: make room, and run again; {_last(manager)}"
        )


def _last(manager):
    step = manager.latest_step()
    return "no checkpoint has been written yet" if step is None else f"the last checkpoint is of step {step}"


def absolute(workdir) -> epath.Path:
    """The workdir's absolute path; Orbax refuses a relative one, but only at the first save.

    Raises:
      UserError: it is a file.
    """
    path = epath.Path(workdir).expanduser()
    path = path if path.is_absolute() else epath.Path(os.getcwd()) / path
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={workdir} is a file: give a folder")
    return path
