"""The quality of samples against the length of a post-hoc average, for a run with config.train.snapshot_every.

    python -m tools.ema_sweep --workdir=runs/digits --lengths=0.03,0.05,0.1,0.2 --num=1797 --out=ema.png

For each length it draws from the same latents and prints the table so far. Last it writes a chart. The distance is the
Fréchet distance of pixels to config.data.split. The first row is the average of config.train.ema_decay.
"""

import argparse

import jax
import numpy as np

import diffusion_jax
from diffusion_jax import parts, sample
from diffusion_jax.data import pixels
from diffusion_jax.evaluation import metrics, quality, report
from diffusion_jax.pictures.shows import read_images
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.running.workdir import read_config

PER_CALL = 200  # images
Row = tuple[float | None, float, float]  # the length, the distance and its standard error


def measure(generated: np.ndarray, real: np.ndarray, ema: float | None) -> Row:
    """Returns the row of some samples, uint8 [n, H, W, C]."""
    x, y = quality.pixels(generated), quality.pixels(real)
    return ema, metrics.frechet_of_features(x, y), metrics.frechet_standard_error(x, y)


def table(rows: list[Row], decay: float) -> list[str]:
    """Returns the lines of a Markdown table."""
    shown = [[f"decay {decay:g}" if ema is None else f"{ema:g}", f"{x:.3f} ± {error:.3f}"] for ema, x, error in rows]
    return markdown_table(("length", "Fréchet distance"), shown)


def write_chart(rows: list[Row], decay: float, out: str) -> None:
    """Writes the distance over the length as .svg or .png, with standard errors and the ordinary average as a line."""
    (_, ordinary, _), *others = rows
    length, distance, error = np.array(others, np.float64).T
    level = np.array([length[[0, -1]], [ordinary, ordinary]])
    series = {"post-hoc average": np.array([length, distance]), f"decay {decay:g}": level}
    figure = report.chart("Averages", "relative length of the average", "Fréchet distance", series, log=False).figure
    assert figure is not None  # all values are finite
    figure.axes[0].errorbar(length, distance, error, fmt=".C0", capsize=2)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--lengths", type=lambda text: [float(x) for x in text.split(",")], default=[0.03, 0.05, 0.07, 0.1, 0.15, 0.2]
    )
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the last")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="ema.png")
    args = parser.parse_args()
    config = read_config(args.workdir)
    real, run = read_images(config, args.workdir)[:], parts.build(config)
    how = {"sampler": args.sampler, "steps": args.steps, "step": args.step}
    sample_fn, _ = diffusion_jax.load(args.workdir, min(args.num, PER_CALL), **how)
    rows: list[Row] = []
    for ema in (None, *args.lengths):
        _, params = sample.ema_params(run, args.workdir, args.step, ema)
        x = [sample_fn(params, jax.random.key(args.seed), first) for first in range(0, args.num, PER_CALL)]
        rows.append(measure(pixels.to_uint8(np.concatenate(x)[: args.num]), real, ema))
        print("\n".join(table(rows, config.train.ema_decay)), flush=True)
    write_chart(rows, config.train.ema_decay, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
