"""The evaluation of a run: bits/dim, rate and distortion, the loss by t, and the quality of samples.

All files go to <workdir>/evaluation/<step>/: evaluation.json for machines, evaluation.md for people.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from diffusion_jax import likelihood, parts, schedule
from diffusion_jax.data import sources
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.evaluation import bound, classifier, inception, metrics, monitor, quality
from diffusion_jax.evaluation.meaning import meaning, verdicts, with_reasons
from diffusion_jax.evaluation.report import report
from diffusion_jax.pictures import grids
from diffusion_jax.pictures.shows import read_images, show
from diffusion_jax.running import checkpoint, files, measured, snapshots
from diffusion_jax.running import config as configs
from diffusion_jax.running.measured import stem
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.running.workdir import evaluation_folder, read_config
from diffusion_jax.sample import ema_params

_SECTIONS = {"samples": "Samples", "samples_to_statistics": "Samples against saved statistics"}
MANY = 10_000  # largest number of held-out images whose nearest training images are searched


def evaluate(
    workdir: epath.PathLike,
    *,
    seed: int = 0,
    num: int | None = None,
    splits: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    samples: str = "",
    inception_path: str = "",
    reference: str = "",
    step: int | None = None,
    quick: bool = False,
    sigma: str | None = None,
    ema: float | None = None,
) -> dict[str, Any]:
    """Evaluates the last checkpoint of a run; resumes an evaluation with the same arguments.

    Args:
      seed: the seed of the noise and of the choice of images.
      num: number of images from each split, drawn without replacement; None means all.
      splits: splits of the data set; () means config.data.split and config.data.test_split.
      labels: ("none",) also measures p(x | ∅) for a run with classes, whose bound is that of p(x | y).
      samples: a file or folder that --mode=sample wrote, to compare with the first split; "" leaves samples out.
      inception_path: weights of Inception v3, see `inception`; "" uses pixels as features.
      reference: statistics that another evaluation saved, to compare with in place of a split.
      step: the step of the checkpoint; None is the last.
      quick: True measures bound.QUICK images of each split, unless `num` is given, and bound.TERMS of the T terms of
        each, see `bound.evaluate_split`, and writes neither the statistics of the split nor progressive.png.
      sigma: the deviations of the bound in place of the config's; "analytic" takes those of an earlier evaluation.
      ema: the relative length of a post-hoc average, see `diffusion_jax.load`; its files go to <step>-ema<length>/.

    Returns:
      The content of evaluation.json.

    Raises:
      UserError: there is no run, no checkpoint or no such split; samples or statistics cannot be used. Nothing has
        been measured then.
    """
    _check_arguments(seed, num, splits)
    snapshots.check(ema)
    num = bound.QUICK if quick and num is None else num
    config = configs.with_sampling(read_config(workdir), sigma=sigma)
    _check_levels(config)
    run = parts.build(config, measured.read(workdir, config, step, ema))
    densities = _densities(config, labels)
    generated, extractor, saved = _read_samples(config, run.image_shape, samples, inception_path, reference)
    step, params = ema_params(run, workdir, step, ema)
    datasets = _datasets(config, workdir, splits)
    asked = None
    if generated is not None and saved is None:
        asked = _asked(samples, datasets)
        quality.check_sizes(extractor.num_features, len(generated), len(next(iter(datasets.values()))))
    folder = evaluation_folder(workdir, step, ema)
    sigma_name, deviations = _deviations(config, run)
    protocol = _protocol(run, sigma_name, seed, densities, quick, ema)
    result = {"step": step, "seed": seed, "protocol": protocol, "splits": {}} | _earlier_samples(folder)
    for split, dataset in datasets.items():
        chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num])
        for density in densities:
            name = f"{split} without labels" if density == "x given ∅" else split
            saved_as = folder / f"bound-{stem(name)}{'-quick' if quick else ''}.npz"
            of = config.train.batch_size, saved_as, _identity(config, params, split, chosen, seed, density)
            values = bound.evaluate_split(
                run, deviations, params, dataset, chosen, seed, *of, density == "x given y", quick
            )
            result["splits"][name] = {"density": density} | values
    if generated is not None:
        section = "samples" if saved is None else "samples_to_statistics"
        compared = config, generated, samples, asked, datasets, extractor, saved, seed, folder, quick
        result[section] = _evaluate_samples(*compared)
    if jax.process_index() == 0:
        _write(folder, result)
    if not quick:
        show(workdir, "progressive", seed, str(folder / "progressive.png"), step=step, ema=ema)
    if jax.process_index() == 0:
        report(workdir)
        there = sorted(path for path in folder.iterdir() if path.is_file())
        print(f"{folder} holds {', '.join(f'{path.name} ({_megabytes(path.stat().length)})' for path in there)}")
    return result


def _check_levels(config):
    if config.data.range:
        raise UserError(
            f"--mode=evaluate measures images of 256 levels, but config.data.range={tuple(config.data.range)} makes "
            "them float32, which no bits/dim counts: compare samples in Python, or train on uint8"
        )


def _check_arguments(seed, num, splits):
    if num is not None and num < 1:
        raise UserError(f"--num={num} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed} must be in 0 … 2^32 - 1")
    if not all(splits):
        raise UserError(f"--splits={','.join(splits)} has an empty name: give splits such as train,test")


def _write(folder, result):
    files.write_text(folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
    files.write_text(folder / "evaluation.md", markdown(result))
    print(markdown(result))


def _megabytes(num_bytes):
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes > 1e5 else f"{num_bytes / 1e3:.0f} kB"


def _densities(config, labels):
    """Returns the densities to measure, by their names."""
    if labels and not config.model.num_classes:
        raise UserError(f"--labels={','.join(labels)}: the run has no classes: leave it out")
    if labels not in ((), ("none",)):
        raise UserError(
            f"--labels={','.join(labels)} does not go with --mode=evaluate, which takes the labels of the images: give "
            "none to measure p(x | ∅) too, or leave it out"
        )
    return ("x given y", "x given ∅")[: 1 + len(labels)] if config.model.num_classes else ("x",)


def _datasets(config, workdir, splits):
    """Returns {split: images} of `splits`, or else of the config's; they have the classes of the run."""
    named = splits or (config.data.split, *filter(None, [config.data.test_split]))
    try:
        datasets = {split: read_images(config, workdir, split) for split in named}
    except UserError as error:
        raise UserError(f"--splits={','.join(splits)}: {error}" if splits else str(error)) from None
    for split, dataset in datasets.items():
        if config.model.num_classes and list(dataset.classes) != list(config.data.classes):
            few = [", ".join(names[:20]) or "none" for names in (list(dataset.classes), list(config.data.classes))]
            raise UserError(
                f"the split {split} has the classes {few[0]}, but the run {few[1]}: give --splits with those"
            )
    return datasets


def _asked(path, datasets):
    """Returns the class that each sample was asked for, int [n]; None if the samples or the images have no classes."""
    classes, *others = (tuple(dataset.classes) for dataset in datasets.values())
    return quality.read_labels(path, len(classes)) if classes and {*others} <= {classes} else None


def _earlier_samples(folder):
    """Returns the sample sections of an earlier evaluation of the step, to be replaced one by one."""
    try:
        earlier = json.loads((folder / "evaluation.json").read_text())
        sections = {name: earlier[name] for name in _SECTIONS if name in earlier}
        for section in sections.values():
            _section(section)
    except FileNotFoundError:
        return {}
    except Exception as error:  # JSON of any content
        if jax.process_index() == 0:
            print(f"{folder}/evaluation.json is damaged ({one_line(error, 200)}): its samples are left out")
        return {}
    return sections


def _identity(config, params, split, chosen, seed, density):
    """Returns a digest of everything that the numbers of a split depend on."""
    values = [config.to_dict(), checkpoint.checksums(params), split, chosen.tolist(), seed]
    values += [] if density == "x" else [density]  # files of earlier versions stay valid
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _deviations(config, run):
    """Returns (name, sigma [T + 1]) for the bound; sigma zero has no bound, and the posterior sigma replaces it."""
    if config.sampling.sigma == "zero":
        return "posterior", schedule.sigma_posterior(run.schedule)
    return config.sampling.sigma, run.sigma


def _protocol(run, sigma_name, seed, densities, quick, ema):
    bits = "bits/dim by the variational bound, one draw of noise for each image and step, over"
    return {
        "bound": f"{bits} {f'one step in each of up to {bound.TERMS} strata' if quick else 'all steps'}",
        "densities": list(densities),
        "parameters": "EMA" if ema is None else f"post-hoc EMA (relative length {float(ema)})",
        "sigma": sigma_name,
        "clip": None if run.clip is None else list(run.clip),
        "decoder": "exact",
        "decoder_std": None if sigma_name == "learned" else float(likelihood.default_decoder_std(run.schedule)),
        "decoder_std_is": "learned" if sigma_name == "learned" else "posterior sigma of t = 2",
        "T": run.schedule.num_steps,
        "seed": seed,
    }


# ---------------------------------------------------------------- samples


class _Extractor(NamedTuple):
    name: str
    checksum: str
    num_features: int
    features: quality.Features


def _extractor(path, image_shape):
    """Returns the features of Inception v3 at `path`, or pixels if it is ""."""
    if not path:
        return _Extractor("pixels", "", math.prod(image_shape), quality.pixels)
    if len(image_shape) != 3:
        raise UserError(f"--inception={path} looks at images, but the run's have {image_shape}: leave it out")
    features, checksum = inception.load_features(path)
    return _Extractor("inception-2015-12-05", checksum, 2048, features)


def _describe(config, images, extractor, origin):
    """Returns the protocol of features of images of the run's size."""
    size = images.shape[1:-1]
    largest = "of the largest square" if len({*size}) == 1 else f"of the largest {':'.join(map(str, size))}"
    resize = f"bicubic, antialiased, centre crop {config.data.crop or largest}" if len(size) == 2 else "none"
    return quality.protocol(images, extractor.name, extractor.checksum, resize, origin)


def _read_samples(config, image_shape, path, inception_path, reference):
    """Returns (the samples or None, their extractor, saved statistics or None), and refuses what cannot be compared."""
    extractor = _extractor(inception_path, image_shape)
    for flag, value in (("reference", reference), ("inception", inception_path)):
        if value and not path:
            raise UserError(f"--{flag}={value} needs --samples to compare with: give a file or a folder")
    if not path:
        return None, extractor, None
    generated = quality.read_samples(path)
    if generated.shape[1:] != image_shape:
        raise UserError(
            f"--samples={path} holds images of {generated.shape[1:]}, but the run's are {image_shape}: give samples of "
            "this run"
        )
    if not reference:
        quality.check_sizes(extractor.num_features, len(generated), quality.K_DENSITY + 1)  # whatever the split has
        return generated, extractor, None
    statistics, protocol = quality.load_statistics(reference)
    quality.check_comparable(_describe(config, generated, extractor, path), protocol)
    if len(statistics.mean) != extractor.num_features:
        raise UserError(
            f"--reference={reference} has {len(statistics.mean)} features, not {extractor.num_features}: give a "
            "statistics-….npz file from --mode=evaluate"
        )
    quality.check_sizes(extractor.num_features, len(generated), None)
    return generated, extractor, (statistics, protocol)


def _evaluate_samples(config, generated, path, asked, datasets, extractor, saved, seed, folder, quick):
    """Compares the samples with `saved` statistics, or else with the first split and its nearest images."""
    protocol = _describe(config, generated, extractor, path) | {"made_by": quality.read_about(path)}
    if saved is not None:
        return quality.frechet_to_statistics(generated, extractor.features, protocol, *saved, seed)
    split, dataset = next(iter(datasets.items()))
    origin = f"{sources.name_of(config.data.source, config.data.path)} {split}"
    reference, (name, _, num_features, features) = _describe(config, dataset, extractor, origin), extractor
    if jax.process_index() == 0:
        print(
            f"comparing {len(generated):,} samples with {len(dataset):,} images of {split}, {num_features:,} features"
        )
    distances = quality.compare(generated, dataset, features, seed)
    nearest, nearest_settings = _nearest(generated, datasets, folder)
    settings = distances.pop("settings") | {"nearest_training_image": nearest_settings}
    if asked is not None:
        by_class, settings_by_class = classifier.compare_classes(generated, asked, datasets, features)
        distances, settings = distances | by_class, settings | settings_by_class
    if num_features <= quality.MAX_FEATURES and not quick:
        statistics = quality.moments(dataset, features)
        if jax.process_index() == 0:
            file = folder / f"statistics-{name}-{stem(split)}.npz"
            size = _megabytes(8 * num_features * (num_features + 1))
            print(f"writing {file.name}, {size}, for --reference in other evaluations; --quick writes none")
            quality.save_statistics(file, statistics, reference)
    protocols = {"samples": protocol, "reference": reference, "metrics": settings}
    return {"protocol": protocols} | distances | {"nearest_training_image": nearest}


def _nearest(generated, datasets, folder):
    """Returns (distances of samples and of held-out images to their nearest training images, settings)."""
    train, *others = datasets.values()
    distance, index = metrics.nearest(quality.pixels(generated), _Pixels(train))
    result = {"median": float(np.median(distance)), "least": float(distance.min())}
    settings = {"distance": "Euclidean, all pixels, in [-1, 1]", "n": len(generated), "training_images": len(train)}
    if others:
        held_out = others[0][:MANY]
        result["median_of_held_out"] = float(np.median(metrics.nearest(quality.pixels(held_out), _Pixels(train))[0]))
        settings["held_out_images"] = len(held_out)
    if jax.process_index() == 0:
        pairs = monitor.nearest_pairs(generated, train, index, distance, not train.array_dtype)
        grids.save_png(folder / "nearest.png", pairs)
    return result, settings


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """A view of a data set as the rows of `quality.pixels`, computed at each access."""

    images: Any

    @property
    def shape(self):
        return len(self.images), math.prod(self.images.shape[1:])

    def __getitem__(self, rows):
        return quality.pixels(self.images[rows])


# ---------------------------------------------------------------- evaluation.md


def markdown(result: dict[str, Any]) -> str:
    """Returns the numbers of evaluation.json as Markdown, each with what it is and what is good."""
    lines = [f"# Evaluation of step {result['step']}", "", *(f"- {text}" for text in verdicts(result)), ""]
    result, protocol = with_reasons(result), result["protocol"]
    names: tuple[str, ...] = ("density", "n", "bits_per_dim", "standard_error", "rate", "distortion", "prior", "loss")
    names += ("histogram_bits_per_dim", "png_bits_per_dim")
    rows = [[split, *(x[name] for name in names)] for split, x in result["splits"].items()]
    lines += markdown_table(["split", *names], rows, _cell)
    lines += ["", *(f"- {name}: {meaning(name, '')}" for name in names)]
    lines += [
        "",
        f"The numbers are {protocol['bound']}; T = {protocol['T']}, sigma {protocol['sigma']}, x_0 clipped to "
        f"{protocol['clip']}, {protocol['decoder']} decoder of deviation {_cell(protocol['decoder_std'])} "
        f"({protocol['decoder_std_is']}), {protocol['parameters']} parameters, seed {protocol['seed']}.",
    ]
    for split, x in result["splits"].items():
        t, rate, distortion = (np.array(x["rate_distortion"][name]) for name in ("t", "rate", "distortion"))
        shown = np.unique(np.linspace(0, len(t) - 1, 11).round().astype(int))[::-1]
        lines += ["", f"## Progressive coding, {split}", ""]
        rows = [[t[i], rate[i], distortion[i], x["loss_by_t"]["loss"][i]] for i in shown]
        lines += markdown_table(["t", "rate, bits/dim", "distortion", "loss (15)"], rows, _cell)
    for name, title in _SECTIONS.items():
        lines += ["", f"## {title}", "", *_section(result[name])] if name in result else []
    return "\n".join(lines) + "\n"


def _section(section):
    """Returns the lines of a section of samples: its values, and the protocol of each."""
    values = [(name, value, meaning(name)) for name, value in section.items() if name != "protocol"]
    lines = [*markdown_table(["", "value", "what it is, and what is good"], values, _cell), ""]
    for name, settings in section["protocol"].items():
        lines.append(f"- {name}: {'; '.join(f'{key}: {_cell(value)}' for key, value in settings.items())}")
    return lines


def _cell(value):
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(x)}" for name, x in value.items())
    return str(value)
