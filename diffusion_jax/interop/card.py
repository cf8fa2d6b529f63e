"""The model card of an exported run: data, training, numbers, licence and intended use, in the form of the Hub."""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.data.sources import name_of
from diffusion_jax.running.workdir import absolute, evaluation_folder

_NUMBERS = (
    "bits_per_dim",
    "standard_error",
    "frechet",
    "frechet_standard_error",
    "frechet_floor",
    "precision",
    "recall",
)
_USE = {
    "jax": 'sample_fn, params = diffusion_jax.load_exported("{out}")\n'
    "x = sample_fn(params, jax.random.key(0), num=16)  # float32 [16, H, W, C] in [-1, 1]",
    "diffusers": 'pipeline = diffusers.DDPMPipeline.from_pretrained("{out}")\n'
    "image = pipeline(num_inference_steps={num_steps}).images[0]",
}


def model_card(
    config: ConfigDict, workdir: epath.PathLike, step: int, out: str, library: str, ema: float | None = None
) -> str:
    """Returns the model card of checkpoint `step` as Markdown with a YAML header, to be completed by its author.

    It names no path of this machine. Its numbers are those of the evaluation of the same step.

    Args:
      out: the exported file or folder.
      library: "jax" or "diffusers".
      ema: the relative length of a post-hoc average; None is that of train.ema_decay.
    """
    config = config.copy_and_resolve_references()
    config.model.attention = "xla"  # cuDNN may be missing here
    (*size, channels), train = parts.image_shape(config), config.train
    data = {1: "signals of {} values", 2: "images of {} pixels", 3: "volumes of {} voxels"}[len(size)]
    data = data.format("×".join(map(str, size)))
    source = epath.Path(name_of(config.data.source, config.data.path)).name  # without the folders of this machine
    classes = f", {config.model.num_classes} classes" if config.model.num_classes else ""
    average = f"an average with decay {train.ema_decay:g}" if ema is None else f"a post-hoc average of length {ema:g}"
    use = _USE[library].format(out=epath.Path(out).name, num_steps=config.schedule.num_steps)
    return f"""---
license: unknown  # fill in: the rights in the training images bind the weights too
library_name: {library}
tags: [ddpm, diffusion, image-generation]
---

# {absolute(workdir).name}

A denoising diffusion model (DDPM) of {data} with {channels} channel(s){classes}, made by
diffusion_jax.

- **Data**: {source}, split {config.data.split}; describe the images, their origin and their rights here.
- **Network**: Ho et al.'s UNet, {parts.num_parameters(config):,} parameters; it predicts {config.model.prediction}.
- **Schedule**: {config.schedule.name}, T = {config.schedule.num_steps}.
- **Training**: {step:,} steps of {train.batch_size} images, loss {train.loss}, Adam with learning rate
  {train.learning_rate:g}; the weights are {average}.

## Numbers

{_numbers(evaluation_folder(workdir, step, ema) / "evaluation.json")}

## Use

```python
{use}
```

## Intended use

To draw images like those of the training data, for study and research; state here what else it is for. The images show
the training data's biases and may come close to single images of it: look at evaluation's nearest.png before you
publish a model of private pictures. It is not for images that pass as photographs of real people or events.
"""


def _numbers(file):
    """Returns the rows of the evaluation that a reader looks for, or how to get them."""
    missing = (
        "This checkpoint was not evaluated: `diffusion_jax --mode=evaluate --workdir=RUN --samples=FILE` does that."
    )
    try:
        result = json.loads(file.read_text())
        groups = {f"split {name}": values for name, values in result["splits"].items()}
        groups |= {"samples": result["samples"]} if "samples" in result else {}
        rows = [
            f"| {where} | {name} | {_text(x[name])} |"
            for where, x in groups.items()
            for name in _NUMBERS
            if x.get(name)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # JSON of any content
        return missing
    return "\n".join(["| of | number | value |", "| --- | --- | --- |", *rows]) if rows else missing


def _text(value: Any) -> str:
    """Returns a number, or a mean with its error."""
    return " ± ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else f"{value:.4g}"
