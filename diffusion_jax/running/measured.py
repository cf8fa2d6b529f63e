"""What `--mode=evaluate` has measured of a run's network at each t, for sigma=analytic and grid=bound."""

import zipfile
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running.workdir import evaluation_folder


class Measured(NamedTuple):
    """Means over images at each t, float64 [T + 1]; entry 0 is not used."""

    squared_error: np.ndarray  # ‖x_0 − x̂_0‖², for `sampling.grid_by_bound`
    mean_square: np.ndarray  # ‖ε̄_θ‖², for `schedule.sigma_analytic`


def needed(config: ConfigDict) -> str:
    """Returns the setting of the sampler that needs a `Measured`, "grid=bound" or "sigma=analytic", or ""."""
    if config.sampling.grid == "bound":
        return "grid=bound"
    return "sigma=analytic" if config.sampling.sigma == "analytic" and config.sampling.sampler != "dpmpp_2m" else ""


def read(
    workdir: epath.PathLike, config: ConfigDict, step: int | None = None, ema: float | None = None
) -> Measured | None:
    """Returns the means over the images of data.split, or None if the sampler does not need them.

    Args:
      step: the step whose evaluation is read; None is the last that was evaluated.
      ema: the relative length of the post-hoc average that was evaluated; None is that of train.ema_decay.

    Raises:
      UserError: it needs them, and no step, or not this one, was evaluated at all t.
    """
    if not (key := needed(config)):
        return None
    folder, name = evaluation_folder(workdir, "*", ema), f"bound-{stem(config.data.split)}.npz"
    suffix, files = folder.name.removeprefix("*"), folder.parent.glob(f"{folder.name}/{name}")
    by_step = {file.parent.name.removesuffix(suffix): file for file in files}
    found = {int(number): file for number, file in by_step.items() if number.isdecimal()}
    if not found or step not in (None, *found):
        of = ("" if step is None else f" --step={step}") + ("" if ema is None else f" --ema={ema}")
        raise UserError(
            f"--{key} needs the errors of the network at each t: measure them with --mode=evaluate "
            f"--workdir={workdir}{of} --num=256 (--quick does not)"
        )
    file = found[max(found) if step is None else step]
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            num, (_, squared_error, _, mean_square) = len(content["each"]), content["sums"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # also of an earlier version
        raise UserError(f"{file} cannot be read ({one_line(error)}): remove it and run --mode=evaluate again") from None
    return Measured(*(np.append(0.0, sums / max(num, 1)) for sums in (squared_error, mean_square)))


def stem(split: str) -> str:
    """Returns a split's name as part of the name of a file."""
    return "".join(c if c.isalnum() else "-" for c in split).strip("-")
