"""The keys of a config: their types, their valid values, and which of them identify a run.

`configs/default.py` holds every key once, with a value of its type and a comment. Nothing here builds an
object: `diffusion_jax.parts` does.
"""

import difflib
import importlib.resources
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax.configs import default
from diffusion_jax.errors import UserError
from diffusion_jax.unet import check_image_size

CHOICES = {
    "schedule.name": ("su_linear", "ho_linear", "cosine"),
    "model.prediction": ("eps_bar", "x_0", "velocity"),
    "model.attention": ("xla", "cudnn"),
    "model.dtype": ("float32", "bfloat16"),
    "train.loss": ("simple", "step", "weighted_step", "vlb"),
    "train.t_sampling": ("uniform", "importance"),
    "sampling.sampler": ("ancestral", "ddim", "dpmpp_2m"),
    "sampling.sigma": ("zero", "beta", "posterior"),
    "data.channels": (1, 3),
}
_AT_LEAST_1 = (
    "data.image_size",
    "schedule.num_steps",
    "model.num_res_blocks",
    "model.num_groups",
    "train.num_steps",
    "train.batch_size",
    "train.accumulate",
    "train.steps_per_dispatch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "sampling.num",
)
_AT_LEAST_0 = (
    "seed",
    "data.crop",
    "train.warmup_steps",
    "train.max_bad_steps",
    "train.sample_every",
    "train.evaluate_every",
)
# Far above every network, and below what exhausts the memory: configs travel with weights and exported samplers.
AT_MOST = {
    "data.image_size": 2**14,
    "model.channels": 2**16,
    "model.num_res_blocks": 64,
    "schedule.num_steps": 10**6,
}
# These identify a run; the other keys may change when it resumes.
_IDENTITY = (
    *("data.source", "data.path", "data.split", "data.image_size", "data.channels", "data.crop"),
    *("schedule.", "model."),
)
_SAME_NETWORK = ("model.attention",)  # may change: its choices compute the same output
# An imported run takes these from the config that starts its training.
_OF_TRAINING = ("data.source", "data.path", "data.split", "data.crop", "model.dropout")


def shipped() -> dict[str, Path]:
    """Returns {name: file} of the configs that the package ships."""
    folder = Path(str(importlib.resources.files("diffusion_jax") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def flatten(config: ConfigDict) -> dict[str, object]:
    """Returns {"seed": 0, "train.loss": "simple", …}, lists as tuples."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}


def complete(config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` in which a missing key has the value of `configs/default.py`.

    Runs of earlier versions lack the keys that were added since. The default of a new key is therefore
    what the versions before it did.
    """
    full = default.get_config()
    with full.ignore_type():
        full.update(config)
    return full


def with_sampling(
    config: ConfigDict,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool | None = None,
    dtype: str | None = None,
    num: int | None = None,
) -> ConfigDict:
    """Returns a checked copy of the config with these values, unless None, in place of its own.

    Raises:
      UserError: a value is invalid, or eta is given for another sampler than ddim.
    """
    values = {"sampler": sampler, "steps": steps, "eta": eta, "clip": clip, "num": num}
    flat = {f"sampling.{key}": value for key, value in values.items() if value is not None}
    flat |= {} if dtype is None else {"model.dtype": dtype}
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: _as_python(value) for key, value in flat.items()})
    check(config)
    if eta is not None and config.sampling.sampler != "ddim":
        raise UserError(
            f"eta={eta} applies to ddim, but the sampler is {config.sampling.sampler}: leave it out, or choose ddim"
        )
    return config


def _as_python(value):
    """Converts a NumPy scalar to a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def check(config: ConfigDict) -> None:
    """Checks the names, types and values of all keys. Opens no file.

    Raises:
      UserError: names the first invalid key, its value and what to do.
    """
    _check_types(config)
    for key, names in CHOICES.items():
        _need(config, key, lambda value, names=names: value in names, f"one of {', '.join(map(str, names))}")
    for key in _AT_LEAST_1:
        _need(config, key, lambda value: value >= 1, "an integer >= 1")
    for key in _AT_LEAST_0:
        _need(config, key, lambda value: value >= 0, "an integer >= 0")
    for key, most in AT_MOST.items():
        _need(config, key, lambda value, most=most: value <= most, f"at most {most:,}")
    for key in ("train.learning_rate", "train.grad_clip"):
        _need(config, key, lambda value: 0 < value < float("inf"), "a number > 0")
    _need(config, "data.cache_limit_gb", lambda value: value >= 0, "a number >= 0")
    for key in ("model.dropout", "train.ema_decay"):
        _need(config, key, lambda value: 0 <= value < 1, "in [0, 1)")
    _need(config, "model.channels", lambda value: value >= 4 and value % 2 == 0, "an even number >= 4")
    for key in ("model.multipliers", "model.attention_resolutions"):
        _need(config, key, lambda value: all(isinstance(n, int) and n >= 1 for n in value), "integers >= 1")
    _need(config, "model.multipliers", lambda value: len(value) >= 1, "one multiplier per level, e.g. (1, 2, 2)")
    _check_sampling(config)
    _check_vlb(config)
    _check_attention(config)
    _check_length(config)
    _check_image_size(config)


def check_key(key: str) -> None:
    """Raises UserError, naming the nearest key, unless `key` ("train.loss") is a key of a config."""
    keys = flatten(default.get_config())
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
        raise UserError(f"config.{key} is not a key of the config: the nearest is config.{near}")


def check_same_run(old: ConfigDict, new: ConfigDict, workdir: object) -> None:
    """Raises UserError, naming the keys, if the configs differ in network, schedule or data set.

    A run that was imported without images has no data set yet and takes the one of `new`.
    """
    chosen = has_images(old)
    before, now = flatten(old), flatten(new)
    changed = [
        f"{key}: {before[key]!r} there, {now[key]!r} here"
        for key in sorted(before)
        if key.startswith(_IDENTITY)
        and key not in _SAME_NETWORK
        and (chosen or key not in _OF_TRAINING)
        and before[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds another run (config.{', config.'.join(changed)}): give another workdir, or the "
            "config of this one (if the same files have moved, correct its config.json)"
        )


def has_images(config: ConfigDict) -> bool:
    """True if the config names images. An imported run may lack them; training needs them."""
    return config.data.source != "files" or bool(config.data.path)


def check_batch(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError unless the batch divides evenly among the devices and train.accumulate."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch % (num_devices * parts):
        among = f"{num_devices} devices" + (f" of config.train.accumulate={parts} parts each" if parts > 1 else "")
        multiple = num_devices * parts
        raise UserError(
            f"config.train.batch_size={batch} does not divide among {among}: make it a multiple of {multiple}"
        )


def _need(config: ConfigDict, key: str, holds: Callable, wanted: str) -> None:
    value = flatten(config)[key]
    if not holds(value):
        raise UserError(f"config.{key}={value!r} must be {wanted}")


def _check_types(config):
    """Checks that keys and types are those of configs/default.py; an int is accepted for a float."""
    values, reference = flatten(config), flatten(default.get_config())
    for key, value in values.items():
        check_key(key)
        kind = type(reference[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"config.{key}={value!r} must be of type {kind.__name__}")
    for key in reference.keys() - values.keys():
        raise UserError(f"config.{key} is missing: start from configs/default.py")


def _check_sampling(config):
    """Checks that sampling.sampler, steps and eta suit each other and the schedule."""
    steps, num_steps = config.sampling.steps, config.schedule.num_steps
    _need(config, "sampling.steps", lambda value: 0 <= value <= num_steps, f"in 1..{num_steps}, or 0 for all")
    _need(config, "sampling.eta", lambda value: 0 <= value < float("inf"), "a number >= 0")
    if config.sampling.sampler == "ancestral" and steps not in (0, num_steps):
        raise UserError(
            f"config.sampling.steps={steps} does not fit config.sampling.sampler='ancestral', which takes all "
            f"{num_steps} steps: choose ddim or dpmpp_2m, or 0 steps"
        )


def _check_vlb(config):
    if config.train.loss != "vlb":
        _need(config, "train.t_sampling", lambda value: value == "uniform", "'uniform' unless config.train.loss='vlb'")
    elif config.schedule.num_steps < 2 or config.sampling.sigma == "zero":
        raise UserError(
            f"config.train.loss='vlb' needs a deviation > 0 at each step: config.sampling.sigma="
            f"{config.sampling.sigma!r} must be beta or posterior, config.schedule.num_steps="
            f"{config.schedule.num_steps} at least 2"
        )


def _check_attention(config):
    """Checks the limits of cuDNN's flash attention: bfloat16, and heads of up to 256 channels."""
    if config.model.attention != "cudnn":
        return
    _need(config, "model.dtype", lambda value: value == "bfloat16", "'bfloat16' for config.model.attention='cudnn'")
    levels = [config.data.image_size // 2**i for i in range(len(config.model.multipliers))]
    attended = [*(i for i, size in enumerate(levels) if size in config.model.attention_resolutions), -1]
    widest = config.model.channels * max(config.model.multipliers[i] for i in attended)  # -1: in the middle
    if widest > 256:
        raise UserError(
            f"config.model.attention='cudnn' takes up to 256 channels, but this network attends to {widest} "
            "(config.model.channels times config.model.multipliers): choose 'xla'"
        )


def _check_length(config):
    examples = config.train.num_steps * config.train.batch_size
    if examples >= 2**32:
        raise UserError(
            f"config.train.num_steps={config.train.num_steps} of config.train.batch_size={config.train.batch_size} are "
            f"{examples:,} examples, more than the limit of {2**32:,}: lower one of them"
        )


def _check_image_size(config):
    size, levels = config.data.image_size, len(config.model.multipliers)
    try:
        check_image_size(size, size, levels)
    except ValueError as error:
        raise UserError(
            f"config.data.image_size={size} does not fit config.model.multipliers={config.model.multipliers}: {error}"
        ) from None
