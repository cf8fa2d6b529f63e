"""Snapshots of the power-function averages of a run, and averages of other lengths made from them.

<workdir>/averages/<step>.npz has the leaves of both averages under their relative lengths, as "0.05/conv_in/kernel".
It has the run and the step as JSON in "about", and as every zip a CRC-32 of each array.
"""

import json
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import averages, due, files, history
from diffusion_jax.running.watch import waiting

LONGEST = 12**-0.5  # the relative length of the plain mean over all steps, 0.2887
WORST = 0.1  # error of the profile, see `averages.fit`, above which no average is made


def check(ema: float | None) -> None:
    """Raises UserError unless `ema` is None or a relative length in (0, LONGEST]."""
    if ema is not None and not (isinstance(ema, int | float | np.number) and 0 < ema <= LONGEST):
        raise UserError(f"ema={ema!r} must be a relative length, above 0 and up to 0.2886: try 0.05, 0.1 or 0.15")


def with_averages(state: Any, num: int) -> Any:
    """Returns a state whose run keeps `num` averages; they begin at the parameters of step 0.

    Raises:
      UserError: the state has none, and is of a later step.
    """
    if not num or state.averages:
        return state
    if int(state.step):
        raise UserError(
            f"config.train.snapshot_every: checkpoint {int(state.step)} has no averages, which a run keeps from its "
            "first step on: set config.train.snapshot_every=0, or give another workdir"
        )
    # Copies: the step donates its state, and one array cannot be donated twice.
    return state._replace(averages=tuple(jax.tree.map(np.copy, state.params) for _ in range(num)))


def resume(folder: epath.Path, every: int, num_steps: int, state: Any) -> None:
    """Removes the snapshots after the state's step, which training makes again, and writes one that is due.

    Prints how much disk the snapshots of the run take in all, or that it keeps averages no longer. At step 0 the shapes
    of a state are enough.
    """
    step = int(state.step)
    if not every:
        if steps(folder):
            print(f"config.train.snapshot_every=0: the averages of the run end at step {step}, and cannot go on later")
        return
    for later in (number for number in steps(folder) if number > step):
        _file(folder, later).unlink()
    if due.is_due(step, [every]):
        write(folder, step, state.averages)
    print(_cost(folder, every, num_steps, state.averages))


def write(folder: epath.Path, step: int, trees: tuple) -> None:
    """Writes the averages after `step` steps, unless their file exists.

    Raises:
      UserError: the file cannot be written.
    """
    file = _file(folder, step)
    if file.exists():
        return
    arrays = _flat(trees)
    about = np.array(json.dumps({"run": history.read(folder)["run"], "step": step}))
    try:
        with files.replacing(file) as opened:
            np.savez(opened, about=about, **arrays)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({one_line(error)}): make room or fix the permissions, and run again"
        ) from None


def needed(like: Any, ema: float | None) -> Any:
    """Returns the fields of a state, or of its shapes, that `average` needs; the others are None.

    Raises:
      UserError: see `check`.
    """
    check(ema)
    if ema is None:
        return like._replace(params=None, opt_state=None, averages=None)
    both = (like.ema_params,) * len(averages.EXPONENTS)  # also where the config no longer keeps them
    return like._replace(params=None, opt_state=None, ema_params=None, averages=both)


def average(folder: epath.Path, run: str, state: Any, ema: float | None) -> dict:
    """Returns the average of relative length `ema` at a checkpoint, float32; None is that of train.ema_decay.

    It is made of the checkpoint's own averages and of the snapshots of the steps before.

    Args:
      run: the identity of the run.
      state: what `needed` wants of the checkpoint.

    Raises:
      UserError: the checkpoint has no averages, a snapshot is damaged or of another run, or the snapshots are too few
        for this length.
    """
    if ema is None:
        return state.ema_params
    step, last = int(state.step), state.averages
    if not last:
        raise UserError(
            f"ema={ema}: checkpoint {step} has no averages: train with config.train.snapshot_every > 0 from the first "
            "step on, or leave ema out"
        )
    earlier = [number for number in steps(folder) if number < step]
    t = np.repeat(np.array([*earlier, step], np.float64), len(averages.EXPONENTS))
    gamma = np.tile(averages.EXPONENTS, len(earlier) + 1)
    weights, error = averages.fit(t, gamma, step, averages.exponent(ema))
    if error > WORST:
        raise UserError(
            f"ema={ema}: the {len(earlier)} snapshots in {folder / 'averages'} give its profile only to {error:.0%}: "
            f"restore missing ones, or give a length nearer to {' or '.join(map(str, averages.SIGMA_REL))}"
        )

    def mean():
        newest = _flat(last)
        total = {path: np.zeros(leaf.shape) for path, leaf in flatten_dict(last[0], sep="/").items()}  # float64
        for number, of_profiles in zip([*earlier, step], weights.reshape(-1, len(last)), strict=True):
            arrays = _read(folder, number, run, newest) if number < step else newest
            for sigma_rel, weight in zip(averages.SIGMA_REL, of_profiles, strict=True):
                for path in total:
                    total[path] += weight * arrays[f"{sigma_rel}/{path}"]
        return {path: array.astype(np.float32) for path, array in total.items()}

    return unflatten_dict(waiting(f"averaging {len(earlier) + 1} snapshots", mean), sep="/")


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the snapshots in a workdir."""
    return sorted(int(path.stem) for path in (folder / "averages").glob("*.npz") if path.stem.isdecimal())


def _file(folder, step):
    return folder / "averages" / f"{step}.npz"


def _flat(trees):
    """Returns {"0.05/conv_in/kernel": array, …} of the averages."""
    named = zip(averages.SIGMA_REL, jax.device_get(trees), strict=True)
    return {f"{name}/{path}": leaf for name, tree in named for path, leaf in flatten_dict(tree, sep="/").items()}


def _read(folder, step, run, like):
    """Returns the arrays of a snapshot, which must be of this run and have the shapes of `like`."""
    file = _file(folder, step)
    mend = "restore it from a copy, or remove it to do without it"
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            arrays = {name: content[name] for name in like}  # which checks their checksums
    except Exception as error:  # zipfile, zlib, NumPy and JSON raise many types for a damaged file
        raise UserError(f"{file} cannot be read ({one_line(error, 200)}): {mend}") from None
    shapes_fit = all(array.shape == like[name].shape for name, array in arrays.items())
    if about != {"run": run, "step": step} or not shapes_fit:
        raise UserError(f"{file} is not of this run and step ({about}; the run is {run}): {mend}")
    return arrays


def _cost(folder, every, num_steps, trees):
    """Returns how much disk the snapshots of a run take in all, and a warning if less is free."""
    size, number = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)), num_steps // every
    text = f"snapshots: {number:,} × {_bytes(size)} = {_bytes(number * size)} in {folder / 'averages'}"
    left = (number - len(steps(folder))) * size
    if "://" not in str(folder) and left > (free := shutil.disk_usage(folder).free):
        text += f"; warning: {_bytes(free)} are free, so raise config.train.snapshot_every={every} or make room"
    return text


def _bytes(number):
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
