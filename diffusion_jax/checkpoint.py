"""The workdir of a run: its config, and its checkpoints in Orbax's format.

    config.json · checkpoints/<step>/ · metrics.jsonl · samples/<step>.png · TensorBoard events

A checkpoint is the training state as NumPy arrays, with no device axis, no random key and
no position in the data: all that is a function of the step.
"""

import json
import os

import jax
import orbax.checkpoint as ocp  # noqa: TID251 (the room of Orbax)
from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (config.json)
from orbax.checkpoint.checkpoint_managers import LatestN  # noqa: TID251

from diffusion_jax.errors import UserError


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


def open_manager(workdir, keep: int = 3) -> ocp.CheckpointManager:
    """Orbax's manager of the run's checkpoints; use it as a context, which waits for the last save."""
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
    return ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts to write the state (a pytree of arrays) as checkpoint `step`; copies it first."""
    manager.save(step, args=ocp.args.StandardSave(jax.device_get(state)))


def restore(manager: ocp.CheckpointManager, like):
    """The newest checkpoint as NumPy arrays, or None where there is none yet.

    Args:
      like: a pytree of arrays, or of their shapes, as it was saved.
    """
    step = manager.latest_step()
    if step is None:
        return None
    return manager.restore(step, args=ocp.args.StandardRestore(like))


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
