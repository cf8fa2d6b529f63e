"""How few steps are enough: samplers, grids, noises and numbers of steps, compared with all T steps on one run.

The results go to <workdir>/evaluation/<step>/tune.json, after each row, and tune.md.
"""

import functools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from diffusion_jax import parts
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics, quality
from diffusion_jax.pictures.shows import read_images
from diffusion_jax.running import checkpoint, files, measured, watch
from diffusion_jax.running import config as configs
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.running.workdir import absolute, read_config
from diffusion_jax.sample import ema_params

STEPS = (5, 10, 20, 50, 100, 250)
SERIES = (  # sampler, grid, eta
    ("dpmpp_2m", "log_snr", 0.0),
    ("dpmpp_2m", "log_snr", 1.0),
    ("dpmpp_2m", "uniform", 1.0),
    ("ddim", "uniform", 0.0),
    ("ddim", "uniform", 1.0),
    ("ddim", "quadratic", 0.0),
    ("dpmpp_2m", "bound", 0.0),
    ("ddim", "bound", 0.0),
)
ERRORS = 2  # a row is no worse if its distance exceeds that of all steps by at most so many standard errors
_ALL = {"sampler": "ancestral", "grid": "default"}


def tune(workdir: epath.PathLike, *, num: int = 1024, seed: int = 0, step: int | None = None) -> list[dict[str, Any]]:
    """Measures the Fréchet distance in pixels of samples by all T steps, and by samplers of few steps.

    Each sampler of SERIES gets more steps, from STEPS, until its distance is no worse than that of all steps. A
    second call with the same arguments goes on after the last row. Grids by the bound need an earlier evaluation, and
    are left out without one.

    Args:
      num: samples of each row; image i has the same latent in all.
      seed: the seed of the samples.
      step: the step of the checkpoint; None is the last.

    Returns:
      The rows of tune.json: sampler, grid, steps, frechet, standard_error, seconds, and of all but the first eta and
      no_worse.

    Raises:
      UserError: there is no run or no checkpoint, the images are too large for distances in pixels, or there are
        several processes.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=tune takes one process: leave out --num_processes")
    config = read_config(workdir)
    if config.data.range:
        raise UserError(
            f"--mode=tune compares images of 256 levels, but config.data.range={tuple(config.data.range)} makes them "
            "float32: choose a sampler by eye, or train on uint8"
        )
    if (size := math.prod(parts.image_shape(config))) > quality.MAX_FEATURES:
        raise UserError(
            f"--mode=tune compares pixels, and these images have {size:,} values, more than {quality.MAX_FEATURES:,}: "
            "compare by --mode=evaluate with --inception"
        )
    images = read_images(config, workdir)
    quality.check_sizes(size, num, len(images))
    step, params = ema_params(parts.build(config), workdir, step)
    file = absolute(workdir) / "evaluation" / str(step) / "tune.json"
    about = {"num": num, "seed": seed, "parameters": checkpoint.checksums(params)}
    rows = _earlier(file, about)

    def save():
        files.write_text(file, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")

    real = quality.extract(images, quality.pixels).astype(np.float64)

    def measure(settings):
        known = next((row for row in rows if settings.items() <= row.items()), None)
        if known:
            return known
        x, seconds = _draw(configs.with_sampling(config, **settings), workdir, step, params, seed, num)
        features = quality.pixels(x).astype(np.float64)
        row = settings | {"frechet": metrics.frechet_of_features(features, real), "seconds": seconds}
        row["standard_error"] = metrics.frechet_standard_error(features, real)
        rows.append(row)
        save()
        return row

    best = measure(_ALL | {"steps": config.schedule.num_steps})
    for settings in _candidates(config, workdir, step):
        for steps in (steps for steps in STEPS if steps < config.schedule.num_steps):
            row = measure(settings | {"steps": steps})
            error = math.hypot(row["standard_error"], best["standard_error"])
            row["no_worse"] = row["frechet"] <= best["frechet"] + ERRORS * error
            if row["no_worse"]:
                break
    save()
    files.write_text(file.with_suffix(".md"), text := markdown(rows, num))
    print(text)
    return rows


def _candidates(config, workdir, step) -> Iterator[dict[str, Any]]:
    """Yields the sampler, the grid and eta of each series of rows; those by the bound where it has been measured."""
    for sampler, grid, eta in SERIES:
        settings: dict[str, Any] = {"sampler": sampler, "grid": grid, "eta": eta}
        try:
            measured.read(workdir, configs.with_sampling(config, steps=STEPS[0], **settings), step)
        except UserError as error:
            print(f"without {sampler} --grid={grid}: {error}")
        else:
            yield settings


def _earlier(file, about):
    """Returns the rows of an earlier call with the same arguments, or []. Those of an earlier version lack eta."""
    try:
        content = json.loads(file.read_text())
        rows = content["rows"] if content["about"] == about else []
        return [row for row in rows if row["sampler"] == _ALL["sampler"] or "eta" in row]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _draw(config, workdir, step, params, seed, num):
    """Returns (samples uint8 [num, H, W, C], the seconds of the drawing without compilation)."""
    run = parts.build(config, measured.read(workdir, config, step))
    per_call = min(num, run.num_samples)
    of_num, shape = functools.partial(run.sample_fn, per_call), (per_call, *run.image_shape)
    sampler = watch.Sampler(of_num, shape, run.num_sampling_steps, params, flags="")
    params, rng = jax.device_put(params), jax.random.key(seed)
    sampler.compile(params, rng)
    began = time.monotonic()
    x = np.concatenate([pixels.to_uint8(sampler(params, rng, first)) for first in range(0, num, per_call)])
    return x[:num], time.monotonic() - began


def markdown(rows: list[dict[str, Any]], num: int) -> str:
    """Returns the rows as a table, and the cheapest that is no worse than all steps."""
    names = ("sampler", "grid", "eta", "steps", "seconds", "frechet", "no_worse")
    cells = []
    for row in rows:
        distance = f"{row['frechet']:.4g} ± {row['standard_error']:.2g}"
        no_worse = "" if "no_worse" not in row else ("no", "yes")[row["no_worse"]]
        eta = f"{row['eta']:g}" if "eta" in row else ""
        cells.append([row["sampler"], row["grid"], eta, row["steps"], f"{row['seconds']:.1f}", distance, no_worse])
    enough = [row for row in rows if row.get("no_worse")]
    lines = [f"# How few steps are enough: {num:,} samples a row", "", *markdown_table(names, cells, str), ""]
    if not enough:
        return "\n".join([*lines, f"No sampler of up to {STEPS[-1]} steps is within {ERRORS} standard errors."]) + "\n"
    row = min(enough, key=lambda row: (row["steps"], row["frechet"]))
    verdict = (
        f"--sampler={row['sampler']} --steps={row['steps']} --grid={row['grid']} --eta={row['eta']:g} is the cheapest "
        f"that is no worse than all {rows[0]['steps']} steps, by at most {ERRORS} standard errors."
    )
    return "\n".join([*lines, verdict]) + "\n"
