"""The workdir of a run: its config, and its checkpoints in Orbax's format.

    config.json · checkpoints/<step>/ · metrics.jsonl · samples/<step>.png · TensorBoard events

A checkpoint is the training state as NumPy arrays, with no device axis, no random key and
no position in the data: all that is a function of the step.
"""

import json

import jax
import orbax.checkpoint as ocp  # noqa: TID251 (the room of Orbax)
from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (config.json)
from orbax.checkpoint.checkpoint_managers import LatestN  # noqa: TID251

from diffusion_jax.errors import UserError

# What the parameters and their meaning depend on; the rest may change between runs.
IDENTITY = ("data.image_size", "data.channels", "schedule", "model")


def claim(workdir, config: ConfigDict) -> epath.Path:
    """Makes the workdir this config's: writes config.json, or checks the one that is there.

    Returns:
      The absolute path.

    Raises:
      UserError: the workdir holds another model (the keys that differ are named), or
        cannot be used.
    """
    workdir = _absolute(workdir)
    file = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file: give a folder")
    if file.exists():
        _check_identity(read_config(workdir), config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.rename(file)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error}): give another folder") from None
    return workdir


def read_config(workdir) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      UserError: there is none, or it is not JSON.
    """
    file = _absolute(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"--workdir={workdir} holds no run (no config.json): give the workdir of a training run")
    try:
        return ConfigDict(json.loads(file.read_text())).lock()
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it, or give another workdir") from None


def _check_identity(old, new, workdir):
    old, new = _flat(old), _flat(new)
    changed = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.startswith(IDENTITY)
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds another model, config {'; '.join(changed)}: give another workdir, or its config"
        )


def _flat(config):
    """{"model.channels": 128, ...}, with tuples as the lists that JSON makes of them."""
    tree = json.loads(json.dumps(config.to_dict()))
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {".".join(entry.key for entry in path): value for path, value in paths}


def open_manager(workdir, keep: int = 3) -> ocp.CheckpointManager:
    """Orbax's manager of the run's checkpoints; use it as a context, which waits for the last save."""
    options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
    return ocp.CheckpointManager(_absolute(workdir) / "checkpoints", options=options)


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


def _absolute(workdir):
    """Orbax refuses relative paths, at the first save."""
    path = epath.Path(workdir).expanduser()
    return path if path.is_absolute() else epath.Path.cwd() / path
