"""Compares weights of the loss, deviations and grids on small runs of several seeds.

    python -m benchmarks.choices --path=FOLDER_OF_FASHION_MNIST --workdir=runs/choices

For each seed the script trains three runs of equal steps: one with Ho et al.'s loss, one with min-SNR weights, and one
with learned deviations. Of each it measures bits/dim on held-out images for every deviation, and the Fréchet distance
in pixels of samples to the training images, and of the first kind for every deviation, grid and number of steps.
choices.jsonl in --workdir gets a line for each measurement; a second call goes on after the last. The end is a table of
means over the seeds, ± one standard error.
"""

import collections
import itertools
import json
import pathlib
import statistics
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

import diffusion_jax
from diffusion_jax import parts, sampling
from diffusion_jax.configs import own
from diffusion_jax.data import pixels
from diffusion_jax.evaluation import metrics, quality
from diffusion_jax.evaluation.evaluate import evaluate
from diffusion_jax.pictures.shows import read_images
from diffusion_jax.running import config as configs
from diffusion_jax.running import measured
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.running.tables import markdown_table

PATH = flags.DEFINE_string("path", None, "the folder of the four idx files", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where the runs and the measurements go", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each kind")
STEPS = flags.DEFINE_integer("steps", 1500, "training steps of 64 images")
SAMPLES = flags.DEFINE_integer("samples", 512, "samples of few steps; half as many by all steps")
KINDS: dict[str, dict[str, Any]] = {
    "simple": {},
    "min_snr": {"train.weight": "min_snr"},
    "learned": {"model.learned_sigma": True, "train.loss": "hybrid", "sampling.sigma": "learned"},
}
SIGMAS = ("beta", "posterior", "analytic")
GRIDS = {
    "uniform": sampling.grid_uniform,
    "quadratic": sampling.grid_quadratic,
    "log_snr": sampling.grid_log_snr,
    "bound": None,
}
GRID_STEPS = (5, 10, 20, 50)


def config_of(kind: str, seed: int):
    config = own.get_config("cpu")
    small = {
        "data.path": PATH.value,
        "data.test_split": "test",
        "data.image_size": 14,
        "data.channels": 1,
        "data.flip": False,
        "model.multipliers": (1, 2),
        "model.attention_resolutions": (7,),
        "train.batch_size": 64,
        "train.num_steps": STEPS.value,
        "train.sample_every": 0,
        "train.checkpoint_every": STEPS.value,
        "seed": seed,
    }
    config.update_from_flattened_dict(small | KINDS[kind])
    return config


def bits(workdir: pathlib.Path, sigma: str) -> float:
    found = evaluate(workdir, num=512, quick=True, splits=("test",), sigma=sigma)
    return found["splits"]["test"]["bits_per_dim"]


def distance(workdir: pathlib.Path, real: np.ndarray, num: int, **settings: Any) -> float:
    sample_fn, params = diffusion_jax.load(workdir, num=min(num, 256), **settings)
    calls = [sample_fn(params, jax.random.key(0), first) for first in range(0, num, 256)]
    return metrics.frechet_of_features(quality.pixels(pixels.to_uint8(np.concatenate(calls)[:num])), real)


def bits_of_grid(workdir: pathlib.Path, grid: str, steps: int) -> float:
    """Returns what `sampling.grid_by_bound` minimises for a grid, in bits/dim, without the prior's share."""
    config = configs.with_sampling(workdirs.read_config(workdir), sampler="ddim", steps=steps, grid="bound")
    s, found = parts.schedule(config), measured.read(workdir, config)
    ts = GRIDS[grid](s, steps) if GRIDS[grid] else sampling.grid_by_bound(s, found.squared_error, steps)
    return sampling.step_costs(s, found.squared_error)[ts[:-1], ts[1:]].sum() / np.log(2)


def measurements(kind: str):
    """Yields (name, function of (workdir, real)) of what is measured of a run."""
    for sigma in SIGMAS + ("learned",) * (kind == "learned"):
        yield f"bits/dim, {sigma}", lambda workdir, real, sigma=sigma: bits(workdir, sigma)
    for sigma in {"simple": SIGMAS, "min_snr": (), "learned": ("learned",)}[kind]:
        all_steps = {"sampler": "ancestral", "sigma": sigma}
        yield (
            f"Fréchet, all steps, {sigma}",
            lambda workdir, real, of=all_steps: distance(workdir, real, SAMPLES.value // 2, **of),
        )
    grids = tuple(GRIDS) if kind == "simple" else ("log_snr",)
    for grid, steps in itertools.product(grids, GRID_STEPS):
        yield f"bits/dim, {grid}, {steps}", lambda workdir, real, of=(grid, steps): bits_of_grid(workdir, *of)
        few = {"sampler": "ddim", "eta": 1.0, "steps": steps, "grid": grid, "sigma": "posterior"}
        yield f"Fréchet, {grid}, {steps}", lambda workdir, real, of=few: distance(workdir, real, SAMPLES.value, **of)


def main(_):
    logging.set_verbosity(logging.ERROR)  # Orbax tells each of its settings
    folder = pathlib.Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "choices.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed, kind in itertools.product(range(SEEDS.value), KINDS):
        workdir = folder / f"{kind}-{seed}"
        diffusion_jax.train(config_of(kind, seed), workdir)
        if not list(workdir.glob("evaluation/*/bound-train.npz")):
            evaluate(workdir, num=32, splits=("train",))  # for sigma=analytic and grid=bound
        real = quality.extract(read_images(workdirs.read_config(workdir), workdir), quality.pixels)
        for name, measure in measurements(kind):
            about = {"kind": kind, "seed": seed, "what": name}
            if not any(about.items() <= line.items() for line in lines):
                lines.append(about | {"value": float(measure(workdir, real))})
                with file.open("a") as opened:
                    print(json.dumps(lines[-1], ensure_ascii=False), file=opened)
    print("\n".join(table(lines)))


def table(lines: list[dict]) -> list[str]:
    """Returns the means over the seeds, ± one standard error, as a table of Markdown."""
    values = collections.defaultdict(list)
    for line in lines:
        values[line["what"], line["kind"]].append(line["value"])
    rows = []
    for what in dict.fromkeys(line["what"] for line in lines):
        cells = [values[what, kind] for kind in KINDS]
        rows.append([what, *(_mean(cell) if cell else "" for cell in cells)])
    return markdown_table(["", *KINDS], rows, str)


def _mean(values):
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4g} ± {error:.2g}"


if __name__ == "__main__":
    app.run(main)
