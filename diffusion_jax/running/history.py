"""The history of a run: its identity, and every config that trained it.

run.json is {"run": "3f9a…", "starts": [{"step": 0, "time": "2026-…", "config": {"seed": 0, …}}, …]}. A start stands
there if its config is not the one before it; its config trained the steps after `step`, up to the next start. Each
checkpoint carries the identity and the config.
"""

import json
import secrets
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax.errors import UserError
from diffusion_jax.running import config as configs
from diffusion_jax.running import files


def read(folder: epath.Path) -> dict[str, Any]:
    """Returns the content of run.json; a new identity and no starts if there is none, or if it cannot be read."""
    file = folder / "run.json"
    try:
        history = json.loads(file.read_text())
        if isinstance(history["run"], str) and all(isinstance(start["config"], dict) for start in history["starts"]):
            return history
        raise ValueError("it is no history")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{file} cannot be read: it is written anew, and the configs of earlier starts are lost")
    return {"run": "", "starts": []}


def record(folder: epath.Path, run: str, step: int, config: ConfigDict) -> list[str]:
    """Adds a start to run.json, if its config is not that of the start before.

    Returns:
      What has changed since then, as "config.seed: 0 before, 1 now".
    """
    history, now = read(folder), _flat(config)
    before = history["starts"][-1]["config"] if history["starts"] else now
    changes = [
        f"config.{key}: {before[key]!r} before, {value!r} now"
        for key, value in now.items()
        if key in before and before[key] != value  # a version adds keys, whose defaults change nothing
    ]
    if changes or not history["starts"] or history["run"] != run:
        start = {"step": step, "time": time.strftime("%F %T %Z"), "config": now}
        content = {"run": run, "starts": [*history["starts"], start]}
        files.write_text(folder / "run.json", json.dumps(content, indent=1) + "\n")
    return changes


def about(run: str, config: ConfigDict) -> dict[str, Any]:
    """Returns what a checkpoint carries about its run."""
    return {"run": run, "config": _flat(config)}


def new_identity() -> str:
    """Returns the identity of a new run."""
    return secrets.token_hex(8)


def identity(folder: epath.Path, config: ConfigDict, about: dict[str, Any], step: int | None) -> str:
    """Returns the identity of the run in a workdir, which its checkpoint `step` must share.

    A workdir without run.json takes the identity of its checkpoint. A checkpoint of an earlier version has none.

    Args:
      about: what the checkpoint carries, see `about`; {} for none.

    Raises:
      UserError: the checkpoint belongs to another run, or to another schedule or network than config.json's.
    """
    run = read(folder)["run"]
    theirs = about.get("run", "")
    if run and theirs and run != theirs:
        raise UserError(
            f"checkpoint {step} in {folder}/checkpoints belongs to another run ({theirs}; run.json names {run}): "
            "remove it, or copy that run's whole workdir and use the copy"
        )
    before, now = about.get("config", {}), _flat(config)
    differing = [
        f"config.{key}: {before[key]!r} in the checkpoint, {now[key]!r} in config.json"
        for key in sorted(before.keys() & now.keys())
        if key.startswith(("schedule.", "model.")) and key not in configs.SAME_PARAMETERS and before[key] != now[key]
    ]
    if differing:
        raise UserError(
            f"{folder}/config.json does not fit checkpoint {step} ({', '.join(differing)}): correct it; run.json holds "
            "the configs that trained the run"
        )
    return run or theirs or new_identity()


def _flat(config):
    """Returns the flat config as it comes back from JSON."""
    return json.loads(json.dumps(configs.flatten(configs.with_absolute_paths(config))))
