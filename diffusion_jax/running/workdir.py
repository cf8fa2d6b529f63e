"""The workdir of a run: its path and its config.

config.json · checkpoints/<step>/ · metrics.jsonl · samples/<step>.png · TensorBoard events; evaluation adds
evaluation/<step>/ and report.html, a training on arrays images.npz, and train.snapshot_every averages/<step>.npz.
"""

import json
import os
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax.errors import UserError
from diffusion_jax.running import config as configs
from diffusion_jax.running import files


def absolute(workdir: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a workdir; Orbax refuses a relative one, but only at the first save.

    Raises:
      UserError: `workdir` is a file.
    """
    path = epath.Path(workdir).expanduser()
    path = path if "://" in str(path) else epath.Path(os.path.abspath(path))  # without "..", which tensorstore refuses
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={workdir} is a file: give a folder")
    return path


def evaluation_folder(workdir: epath.PathLike, step: int | str, ema: float | None = None) -> epath.Path:
    """Returns the folder of an evaluation: evaluation/<step>, or evaluation/<step>-ema0.1 of a post-hoc average."""
    return absolute(workdir) / "evaluation" / (f"{step}" if ema is None else f"{step}-ema{float(ema)}")


def check_name(folder: epath.Path) -> None:
    """Raises UserError if Orbax cannot write checkpoints into a folder of this name."""
    if characters := sorted(set(str(folder)) & set("*?[\\")):
        raise UserError(
            f"--workdir={folder} has {' '.join(characters)} in its path, where checkpoints cannot be written: give a "
            "folder without these characters"
        )


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes config.json, its paths absolute, and creates the workdir if it is missing.

    Raises:
      UserError: the workdir cannot be written.
    """
    text = json.dumps(configs.with_absolute_paths(config).to_dict(), indent=2) + "\n"
    try:
        files.write_text(absolute(workdir) / "config.json", text)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error}): give another folder") from None


def keep_images(folder: epath.Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Writes arrays as images.npz in a workdir, unless it holds them already, and returns the path of the file.

    Raises:
      UserError: it holds others, or the workdir is in a bucket, where arrays cannot be read.
    """
    file = folder / "images.npz"
    given: dict[str, Any] = {"images": np.asarray(images)}
    given |= {} if labels is None else {"labels": np.asarray(labels)}
    if "://" in str(folder):
        raise UserError(f"images are kept in the workdir, and {folder} is not on a disk: give a file, config.data.path")
    if not file.exists():
        with files.replacing(file) as opened:
            np.savez(opened, **given)
        return str(file)
    with np.load(file) as kept:
        is_same = set(kept.files) == given.keys() and all(np.array_equal(kept[name], given[name]) for name in given)
    if not is_same:
        raise UserError(f"{file} holds other images or labels: give those that it holds, or another workdir")
    return str(file)


def holds_run(workdir: epath.PathLike) -> bool:
    """True if the workdir has a config.json."""
    return (absolute(workdir) / "config.json").exists()


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """Returns the checked config of the run in `workdir`; keys that its version lacked get their defaults.

    Raises:
      UserError: there is no run, config.json is not JSON, or a value in it is invalid.
    """
    file = absolute(workdir) / "config.json"
    if not file.parent.exists():
        raise UserError(f"--workdir={workdir} does not exist: give the workdir of a training run")
    if not file.exists():
        raise UserError(f"--workdir={workdir} holds no run (no config.json): give the workdir of a training run")
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a JSON object ({error}): restore it from run.json, or give another workdir"
        ) from None
    if missing := configs.missing(content):
        raise UserError(f"{file} lacks {', '.join(missing)}: restore it from run.json, or give another workdir")
    try:
        config = configs.complete(ConfigDict(content))
        configs.check(config)
    except (UserError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
    return config.lock()
