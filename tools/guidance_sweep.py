"""The trade-off of guidance: how far samples are from the data, and how often a classifier sees their class.

    python -m tools.guidance_sweep --workdir=runs/digits_classes --weights=0,1,2,3 --num=1000 --out=guidance.svg

For each weight w it draws samples, their classes in turn, prints a row of a Markdown table, and last writes a chart.
The distance is the Fréchet distance of pixels to config.data.split. The classifiers learn from pixels, see
`classifier.compare_classes`; their accuracy on held-out images, the last row, is what perfect samples would reach.
"""

import argparse
from typing import Any

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import classifier, metrics, quality, report
from diffusion_jax.pictures.shows import read_images
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.running.workdir import read_config

PER_CALL = 200  # images


def draw(workdir: str, num: int, weight: float, seed: int, **settings: Any) -> np.ndarray:
    """Returns `num` samples, uint8 [num, H, W, C]; image i has class i modulo the number of classes.

    Args:
      settings: sampler, steps and eta of `sample.load`.
    """
    sample_fn, params = diffusion_jax.load(workdir, min(num, PER_CALL), guidance=weight, progress=True, **settings)
    firsts = range(0, num, PER_CALL)
    return pixels.to_uint8(np.concatenate([sample_fn(params, jax.random.key(seed), i) for i in firsts])[:num])


def measure(generated: np.ndarray, datasets: dict[str, Any]) -> dict[str, Any]:
    """Returns the Fréchet distance of pixels, overall and within classes, the accuracies, and their settings."""
    real = next(iter(datasets.values()))
    x, y = quality.pixels(generated), quality.pixels(real[:])
    asked = np.arange(len(generated)) % len(real.classes)
    values, settings = classifier.compare_classes(generated, asked, datasets, quality.pixels)
    if values["classifiers"] is None:
        raise UserError(f"the classifiers cannot learn from config.data.split: {settings['classifiers']['left_out']}")
    distance = metrics.frechet_of_features(x, y), metrics.frechet_standard_error(x, y)
    return values | {"frechet": distance, "settings": settings}


def table(rows: dict[float, dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table: a row for each weight, and the held-out images as the last."""
    names = ("logistic_regression", "nearest_neighbours")
    last = next(iter(rows.values()))["classifiers"]
    lines = [
        [f"{w:g}", *map(_with_error, (row["frechet"], row["frechet_within_classes"]))]
        + [_percent(*(row["classifiers"][name][key] for key in ("accuracy", "standard_error"))) for name in names]
        for w, row in rows.items()
    ]
    held_out = [_percent(*(last[name][f"held_out_{key}"] for key in ("accuracy", "standard_error"))) for name in names]
    head = ("w", "Fréchet distance", "within classes", "logistic regression", "nearest neighbours")
    return markdown_table(head, [*lines, ["held out", "", "", *held_out]])


def _with_error(pair):
    return "–" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def _percent(share, error):
    return f"{share:.1%} ± {error:.1%}"


def write_chart(rows: dict[float, dict[str, Any]], out: str) -> None:
    """Writes the Fréchet distance over the accuracy of both classifiers, with w along the first, as .svg or .png."""
    series = {
        name.replace("_", " "): np.array(
            [[r["classifiers"][name]["accuracy"], r["frechet"][0]] for r in rows.values()]
        ).T
        for name in ("logistic_regression", "nearest_neighbours")
    }
    figure = report.chart("Guidance", "accuracy", "Fréchet distance", series).figure
    assert figure is not None  # all values are finite
    for w, point in zip(rows, series["logistic regression"].T, strict=True):
        figure.axes[0].annotate(f"w = {w:g}", point, xytext=(3, 3), textcoords="offset points", fontsize=8)
    figure.savefig(out, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--weights", type=lambda text: [float(w) for w in text.split(",")], default=[0, 1, 2, 3])
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", help="default: the config's")
    parser.add_argument("--steps", type=int, help="default: the config's")
    parser.add_argument("--eta", type=float, help="scale of ddim's noise; default: the config's")
    parser.add_argument("--out", default="guidance.svg")
    args = parser.parse_args()
    config = read_config(args.workdir)
    if not config.model.num_classes:
        raise UserError(f"--workdir={args.workdir} is of a run without classes, which has no guidance")
    splits = filter(None, (config.data.split, config.data.test_split))
    datasets = {split: read_images(config, args.workdir, split) for split in splits}
    rows = {}
    for w in args.weights:
        generated = draw(args.workdir, args.num, w, args.seed, sampler=args.sampler, steps=args.steps, eta=args.eta)
        rows[w] = measure(generated, datasets)
        print("\n".join(table(rows)), flush=True)
    write_chart(rows, args.out)
    print(f"{rows[w]['settings']}\n{args.out}")


if __name__ == "__main__":
    main()
