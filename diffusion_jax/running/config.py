"""The keys of a config: their types, their valid values, and which of them identify a run.

`configs/default.py` holds every key once, with a value of its type and a comment. Nothing here builds an
object: `diffusion_jax.parts` does.
"""

import difflib
import functools
import importlib.resources
import math
import operator
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict  # noqa: TID251 (the type of a config)

from diffusion_jax.configs import default
from diffusion_jax.errors import UserError
from diffusion_jax.schedule import MOST_STEPS
from diffusion_jax.unet import check_image_size

CHOICES = {
    "schedule.name": ("su_linear", "ho_linear", "cosine", "sigmoid"),
    "model.prediction": ("eps_bar", "x_0", "velocity"),
    "model.attention": ("xla", "cudnn"),
    "model.dtype": ("float32", "bfloat16"),
    "train.loss": ("simple", "step", "weighted_step", "vlb", "hybrid"),
    "train.weight": ("one", "min_snr", "p2"),
    "train.t_sampling": ("uniform", "importance"),
    "sampling.sampler": ("ancestral", "ddim", "dpmpp_2m"),
    "data.dtype": ("", *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("u", "")), "float32"),
    "sampling.sigma": ("zero", "beta", "posterior", "learned", "analytic"),
    "sampling.grid": ("default", "uniform", "quadratic", "log_snr", "bound"),
}
_INT32 = 2**31 - 1
RANGES = {  # the smallest and the largest integer; configs also come with the weights and samplers of others
    "seed": (0, 2**32 - 1),  # JAX takes seeds modulo 2^32
    "data.image_size": (1, 8192),  # the largest image that can be read has 50,000,000 pixels
    "data.channels": (1, 1024),
    "data.crop": (0, _INT32),
    "schedule.num_steps": (1, MOST_STEPS),
    "model.channels": (4, 2**16),  # 2^63 numbers are the limit of an array
    "model.num_res_blocks": (0, 64),
    "model.num_groups": (1, _INT32),
    "train.num_steps": (1, _INT32),  # the step is an int32
    "train.batch_size": (1, _INT32),
    "train.accumulate": (1, _INT32),
    "train.steps_per_dispatch": (1, _INT32),
    "train.warmup_steps": (0, _INT32),
    "train.max_bad_steps": (0, _INT32),
    "train.log_every": (1, _INT32),
    "train.checkpoint_every": (1, _INT32),
    "train.keep_checkpoints": (1, _INT32),
    "train.evaluate_every": (0, _INT32),
    "train.sample_every": (0, _INT32),
    "train.snapshot_every": (0, _INT32),
    "sampling.num": (1, _INT32),
}
LONGEST = 2**20  # the largest length of a signal; a minute of audio has about as many numbers
# These may also be a function of the user, see `with_functions`. A workdir holds its name, as "python:min_snr".
FUNCTIONS = {"loss": "train.loss", "schedule": "schedule.name", "sigma": "sampling.sigma"}
_PYTHON = "python:"
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
# These identify a run; the other keys may change when it resumes.
_IDENTITY = (
    *("data.source", "data.path", "data.split", "data.image_size", "data.channels", "data.range", "data.crop"),
    *("schedule.", "model."),
)
_MAY_CHANGE = ("model.attention",)  # its choices compute the same output
# A checkpoint fits another value of these.
SAME_PARAMETERS = ("model.attention", "model.dtype", "model.dropout")
# A config of an earlier version may lack others.
_ALWAYS_THERE = (
    *("data.image_size", "data.channels", "schedule.name", "schedule.num_steps"),
    *("model.channels", "model.multipliers", "model.num_res_blocks", "model.attention_resolutions"),
)
# An imported run takes these from the config that starts its training.
_OF_TRAINING = ("data.source", "data.path", "data.split", "data.crop", "model.dropout")


def shipped() -> dict[str, Path]:
    """Returns {name: file} of the configs that the package ships."""
    folder = Path(str(importlib.resources.files("diffusion_jax") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def flatten(config: ConfigDict) -> dict[str, object]:
    """Returns {"seed": 0, "train.loss": "simple", …}, lists as tuples and functions as names."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {key: _plain(key, value) for key, value in flat.items()}


@functools.cache
def defaults() -> Mapping[str, object]:
    """Returns {key: its value in configs/default.py} for all keys, as `flatten` has them."""
    return types.MappingProxyType(flatten(default.get_config()))


def _value(config, key):
    """Returns the value of one key, as `flatten` has it."""
    return _plain(key, functools.reduce(operator.getitem, key.split("."), config))


def _plain(key, value):
    """Returns the name in place of a function of the user, a tuple in place of a list."""
    if key in FUNCTIONS.values():
        value = _named(value)
    return tuple(value) if isinstance(value, list) else value


def with_functions(config: ConfigDict, **functions: Callable | None) -> ConfigDict:
    """Returns a copy of the config with a function, unless None, in place of the name of one of FUNCTIONS.

    Raises:
      UserError: a function has no name of its own, or is not the one that the config names.
    """
    config = config.copy_and_resolve_references()
    for argument, function in functions.items():
        section, key = FUNCTIONS[argument].split(".")
        if function is None:
            continue
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise UserError(f"{argument}={function!r} must be a function with a name, which config.json keeps: use def")
        before = config[section][key]
        if argument != "sigma" and _is_own(before) and before != _PYTHON + name:
            raise UserError(f"{argument}={name} is not the run's own, {before.removeprefix(_PYTHON)}: give that one")
        with config.unlocked(), config.ignore_type():
            config[section][key] = function
    return config


def with_path(config: ConfigDict, path: str) -> ConfigDict:
    """Returns a copy of the config whose images are at a path, data.path."""
    config = config.copy_and_resolve_references()
    config.data.source, config.data.path = "files", path
    return config


def with_dtype(config: ConfigDict, dtype: str) -> ConfigDict:
    """Returns a copy of the config with the type of an array's numbers, data.dtype; "" for pictures."""
    config = config.copy_and_resolve_references()
    config.data.dtype = dtype
    return config


def has_alpha(config: ConfigDict) -> bool:
    """Returns True for pictures: the last of four channels is alpha. Arrays have a data.dtype and no alpha."""
    return not config.data.dtype


def _named(value):
    """Returns the name of a function, and any other value unchanged."""
    return _PYTHON + value.__name__ if callable(value) else value


def _is_own(value):
    """Returns True for the name of a function of the user."""
    return isinstance(value, str) and value.startswith(_PYTHON)


def with_names(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config with the names of its functions, as config.json has them."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for section, key in (key.split(".") for key in FUNCTIONS.values()):
            if callable(value := config.get(section, {}).get(key)):
                config[section][key] = _named(value)
    return config


def resolve(config: ConfigDict, argument: str, table: dict[str, Callable]) -> Callable:
    """Returns the function of the config for one of FUNCTIONS, or that of its name in `table`.

    Raises:
      UserError: the config names a function of the user, which is missing.
    """
    section, key = FUNCTIONS[argument].split(".")
    value = config[section][key]
    if _is_own(value):
        name = value.removeprefix(_PYTHON)
        raise UserError(
            f"config.{section}.{key}={value!r} is a function of the run's own, which only Python can give: "
            f"{argument}={name} to diffusion_jax.train" + (", load or load_network" if argument != "loss" else "")
        )
    return value if callable(value) else table[value]


def missing(content: dict[str, Any]) -> list[str]:
    """Returns the sections and keys that every config has, whatever its version, and that `content` lacks."""
    sections = [name for name, value in default.get_config().items() if isinstance(value, ConfigDict)]
    lacking = [f"config.{name}" for name in sections if not isinstance(content.get(name), dict)]
    keys = [key.split(".") for key in _ALWAYS_THERE]
    return lacking or [f"config.{section}.{key}" for section, key in keys if key not in content[section]]


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
    guidance: float | None = None,
    sigma: str | None = None,
    grid: str | None = None,
) -> ConfigDict:
    """Returns a checked copy of the config with these values, unless None, in place of its own.

    Raises:
      UserError: a value is invalid, eta is given for the ancestral sampler, or guidance for a run without classes.
    """
    if sampler == "ancestral":  # the config may name a sampler of few steps
        steps, grid = steps or 0, grid or "default"
    values = {"sampler": sampler, "steps": steps, "eta": eta, "clip": clip, "num": num, "guidance": guidance}
    values |= {"sigma": sigma, "grid": grid}
    flat = {f"sampling.{key}": value for key, value in values.items() if value is not None}
    flat |= {} if dtype is None else {"model.dtype": dtype}
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: _as_python(value) for key, value in flat.items()})
    check(config)
    if guidance is not None and not config.model.num_classes:
        raise UserError(f"guidance={guidance} needs a run with classes (config.model.num_classes): leave it out")
    if eta is not None and config.sampling.sampler == "ancestral":
        raise UserError(
            f"eta={eta} applies to ddim and dpmpp_2m, but the sampler is ancestral: leave it out, or choose one of them"
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
        own = key in FUNCTIONS.values() and _is_own(_value(config, key))
        _need(
            config,
            key,
            lambda value, names=names, own=own: own or value in names,
            f"one of {', '.join(name or repr(name) for name in names)}",
        )
    flat = flatten(config)
    _check_image_size(config)
    for key, (low, high) in RANGES.items():
        if key != "data.image_size":
            check_integer(f"config.{key}", flat[key], low, high)
    for key in ("train.learning_rate", "train.grad_clip", "train.weight_gamma"):
        _need(config, key, lambda value: _SMALLEST <= value <= _LARGEST, "a number > 0 within float32's range")
    _need(config, "data.cache_limit_gb", lambda value: value >= 0, "a number >= 0")
    for key in ("model.dropout", "train.ema_decay"):
        _need(config, key, lambda value: 0 <= value <= 1 - 2**-24, "in [0, 1), at most 1 - 2^-24 (float32)")
    _need(config, "model.channels", lambda value: value % 2 == 0, "even")
    for key, high in (("model.multipliers", 1024), ("model.attention_resolutions", _INT32)):
        wanted = f"integers in 1..{high:,}"
        _need(config, key, lambda value, high=high: all(type(n) is int and 1 <= n <= high for n in value), wanted)
    _need(config, "model.multipliers", lambda value: len(value) >= 1, "one multiplier per level, e.g. (1, 2, 2)")
    _check_classes(config)
    _check_sampling(config)
    _check_loss(config)
    _check_terminal(config)
    _check_attention(config)
    _check_length(config)
    _check_range(config)
    _check_levels(config)


def with_classes(config: ConfigDict, classes: Sequence[str]) -> ConfigDict:
    """Returns a copy of the config with data.classes and the number that model.num_classes="auto" stands for.

    Args:
      classes: the names of the data's classes; () without classes.

    Raises:
      UserError: model.num_classes does not agree with the data.
    """
    wanted = config.model.num_classes
    if wanted == 0:
        return config
    if not classes:
        raise UserError(
            f"config.model.num_classes={wanted!r}, but the data have no classes: give a folder of images for each, "
            "or config.model.num_classes=0"
        )
    if wanted not in ("auto", len(classes)):
        raise UserError(f"config.model.num_classes={wanted}, but the data have {len(classes)} classes: give auto")
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.model.num_classes, config.data.classes = len(classes), tuple(classes)
    return config


def choose(config: ConfigDict, labels: Sequence[str | int]) -> tuple[int, ...] | None:
    """Returns the numbers of the classes that `labels` names, all for none; None for a run without classes.

    Raises:
      UserError: there is no such class, or the run has no classes.
    """
    num_classes, names = config.model.num_classes, list(config.data.classes)
    if not num_classes:
        if labels:
            raise UserError(f"--labels={','.join(map(str, labels))}: the run has no classes: leave it out")
        return None
    numbers = [names.index(str(label)) if str(label) in names else str(label) for label in labels]
    for label in numbers:
        if not (isinstance(label, int) or (label.isdecimal() and int(label) < num_classes)):
            shown = ", ".join(names[:20]) or f"0..{num_classes - 1}"
            raise UserError(f"--labels: {label!r} is not a class of the run: give some of {shown}")
    return tuple(map(int, numbers)) or tuple(range(num_classes))


def image_size(config: ConfigDict) -> tuple[int, ...]:
    """Returns (height, width) of the images, data.image_size; (length,) of signals, (depth, height, width) of volumes.

    The number of sizes is that of the axes of the data.
    """
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises UserError unless `value` is an integer in low..high; `name` is its key or flag, e.g. "--seed"."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UserError(f"{name}={value!r} must be an integer in {low}..{high:,}")


def check_seed(seed: object) -> None:
    """Raises UserError unless --seed is in 0..2^32 - 1: JAX takes seeds modulo 2^32, so others repeat a seed."""
    check_integer("--seed", seed, *RANGES["seed"])


def warnings(config: ConfigDict, alpha_bar: float) -> list[str]:
    """Returns what will disappoint about a valid config, whose schedule ends at `alpha_bar`, one line each."""
    train, texts = config.train, []
    if alpha_bar > 0.05:
        texts.append(
            f"alpha_bar_T = {alpha_bar:.3f}: x_T still holds that share of the image, but sampling starts from pure "
            "noise; choose another config.schedule.name or a larger config.schedule.num_steps"
        )
    initial = train.ema_decay**train.num_steps
    if initial > 0.01 and not train.ema_warmup:
        texts.append(
            f"config.train.ema_decay={train.ema_decay} over config.train.num_steps={train.num_steps}: {initial:.0%} of "
            "the averaged parameters, which draw the samples, will still be the initial ones, which makes "
            "the samples noisy; set config.train.ema_warmup=True, lower ema_decay or train for longer"
        )
    if train.warmup_steps > train.num_steps:
        texts.append(
            f"config.train.warmup_steps={train.warmup_steps} exceeds config.train.num_steps={train.num_steps}: "
            f"the learning rate only reaches {train.num_steps / train.warmup_steps:.1%} of config.train.learning_rate="
            f"{train.learning_rate}; lower warmup_steps"
        )
    if config.data.channels not in (1, 3) and not has_alpha(config) and len(image_size(config)) > 1:
        shown = f"config.data.channels={config.data.channels}"
        texts.append(f"grids of images have a grey row for each of {shown} channels, and for 8 at most")
    return texts


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """Returns a copy as config.json has it: functions are names, and paths do not depend on the working directory."""
    config = with_names(config)
    with config.unlocked():
        for key in ("source", "path", "manual_dir", "cache_dir"):
            value = config.data[key]
            if value and "://" not in value and not (key == "source" and _is_name(value)):
                config.data[key] = os.path.abspath(os.path.expanduser(value))
    return config


def _is_name(source):
    """Returns True for a data.source that is no path."""
    return source in ("digits", "files") or source.startswith(("tfds:", "hf:"))


def check_key(key: str) -> None:
    """Raises UserError, naming the nearest key, unless `key` ("train.loss") is a key of a config."""
    if key not in defaults():
        near = difflib.get_close_matches(key, defaults(), n=1, cutoff=0)[0]
        raise UserError(f"config.{key} is not a key of the config: the nearest is config.{near}")


def check_same_run(old: ConfigDict, new: ConfigDict, workdir: object) -> None:
    """Raises UserError, naming the keys, if the configs differ in network, schedule or data set.

    Paths are the same if they mean the same file: "./data", "data/" and "~/data" in the home directory.
    A run that was imported without images has no data set yet and takes the one of `new`.
    """
    chosen = has_images(old)
    before, now = (flatten(with_absolute_paths(config)) for config in (old, new))
    changed = [
        f"{key}: {before[key]!r} there, {now[key]!r} here"
        for key in sorted(before)
        if (key.startswith(_IDENTITY) or (key == "train.loss" and _is_own(before[key])))
        and key not in _MAY_CHANGE
        and (chosen or key not in _OF_TRAINING)
        and before[key] != now[key]
        and "auto" not in (before[key], now[key])  # a number of classes that is known when the images are open
    ]
    if changed:
        own = [
            f"{name}={str(before[key]).removeprefix(_PYTHON)}"
            for name, key in FUNCTIONS.items()
            if _is_own(before[key])
        ]
        functions = f" and, to diffusion_jax.train, {', '.join(own)}" if own else ""
        raise UserError(
            f"--workdir={workdir} holds another run (config.{', config.'.join(changed)}): give another workdir, or the "
            f"config of this one{functions} (if the same files have moved, correct its config.json)"
        )


def has_images(config: ConfigDict) -> bool:
    """True if the config names images. An imported run may lack them; training needs them."""
    return config.data.source != "files" or bool(config.data.path)


def check_batch(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError unless the batch divides evenly among the devices and train.accumulate."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if config.train.deterministic:
        if parts % num_devices or parts & (parts - 1):
            raise UserError(
                f"config.train.accumulate={parts} does not go with train.deterministic on {num_devices} device(s): "
                "it cuts the whole batch, so give a power of two that the devices divide"
            )
        among, multiple = f"config.train.accumulate={parts} parts", parts
    else:
        among = f"{num_devices} devices" + (f" of config.train.accumulate={parts} parts each" if parts > 1 else "")
        multiple = num_devices * parts
    if batch % multiple:
        raise UserError(
            f"config.train.batch_size={batch} does not divide among {among}: make it a multiple of {multiple}"
        )


def _need(config: ConfigDict, key: str, holds: Callable, wanted: str) -> None:
    value = _value(config, key)
    if not holds(value):
        raise UserError(f"config.{key}={value!r} must be {wanted}")


def _check_types(config):
    """Checks that keys and types are those of configs/default.py; an int is accepted for a float."""
    values, reference = flatten(config), defaults()
    for key, value in values.items():
        check_key(key)
        kind = type(reference[key])
        if key in ("model.num_classes", "data.image_size"):  # of two types, see `_check_classes`, `_check_image_size`
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"config.{key}={value!r} must be of type {kind.__name__}")
    for key in reference.keys() - values.keys():
        raise UserError(f"config.{key} is missing: start from configs/default.py")


def _check_sampling(config):
    """Checks that sampling.sampler, steps and eta suit each other and the schedule."""
    steps, num_steps = config.sampling.steps, config.schedule.num_steps
    _need(config, "sampling.steps", lambda value: 0 <= value <= num_steps, f"in 1..{num_steps}, or 0 for all")
    _need(config, "sampling.eta", lambda value: 0 <= value <= _LARGEST, "a number >= 0 within float32's range")
    if config.sampling.sampler == "ancestral" and steps not in (0, num_steps):
        raise UserError(
            f"config.sampling.steps={steps} does not fit config.sampling.sampler='ancestral', which takes all "
            f"{num_steps} steps: choose ddim or dpmpp_2m, or 0 steps"
        )
    if config.sampling.sampler == "ancestral":
        wanted = "'default' for config.sampling.sampler='ancestral', which takes all steps"
        _need(config, "sampling.grid", lambda value: value == "default", wanted)


def _check_classes(config):
    """Checks the number of classes and the guidance."""
    wanted = "an integer in 0..65,536, or auto"
    _need(config, "model.num_classes", lambda n: n == "auto" or (type(n) is int and 0 <= n <= 2**16), wanted)
    _need(config, "train.label_dropout", lambda value: 0 <= value <= 1, "in [0, 1]")
    _need(config, "sampling.guidance", lambda value: abs(value) <= _LARGEST, "a number within float32's range")
    steps = config.schedule.num_steps

    def is_interval(value):
        return len(value) == 2 and all(type(t) is int for t in value) and 1 <= value[0] <= value[1] <= steps

    wanted = f"() or two steps (low, high) in 1..{steps}"
    _need(config, "sampling.guidance_interval", lambda value: value == () or is_interval(value), wanted)


def _check_terminal(config):
    """Checks that the network and its loss know x_0 at t = T, where schedule.zero_terminal makes ᾱ_T 0."""
    _need(config, "schedule.log_snr_shift", lambda value: abs(value) <= 20, "a number in -20..20")
    if not config.schedule.zero_terminal:
        return
    with_it = "for config.schedule.zero_terminal, where x_T tells nothing of x_0"
    _need(config, "schedule.num_steps", lambda value: value >= 2, f"at least 2 {with_it}")
    _need(config, "model.prediction", lambda value: value != "eps_bar", f"x_0 or velocity {with_it}")
    _need(config, "train.loss", lambda value: value == "simple" or _is_own(value), f"'simple' {with_it}")
    _need(config, "train.weight", lambda value: value == "one", f"'one' {with_it}: others do not train the step T")


def _check_loss(config):
    """Checks that train.weight and train.t_sampling suit train.loss."""
    if config.train.loss != "simple":
        _need(config, "train.weight", lambda value: value == "one", "'one' unless config.train.loss='simple'")
    learned = config.model.learned_sigma
    if learned:
        with_it = "with config.model.learned_sigma"
        _need(config, "train.loss", lambda value: value in ("hybrid", "vlb"), f"hybrid or vlb {with_it}")
        _need(config, "model.prediction", lambda value: value == "eps_bar", f"eps_bar {with_it}")
        _need(config, "schedule.num_steps", lambda value: value >= 2, f"at least 2 {with_it}")
    else:
        for key, name in (("train.loss", "hybrid"), ("sampling.sigma", "learned")):
            wanted = (
                f"another without config.model.learned_sigma=True, whose network has the deviations that {name} needs"
            )
            _need(config, key, lambda value, name=name: value != name, wanted)
    if config.train.loss != "vlb":
        _need(config, "train.t_sampling", lambda value: value == "uniform", "'uniform' unless config.train.loss='vlb'")
    elif config.schedule.num_steps < 2 or config.sampling.sigma == "zero":
        raise UserError(
            f"config.train.loss='vlb' needs a deviation > 0 at each step: config.sampling.sigma="
            f"{config.sampling.sigma!r} must be beta, posterior or learned, config.schedule.num_steps="
            f"{config.schedule.num_steps} at least 2"
        )


def _check_attention(config):
    """Checks the limits of cuDNN's flash attention: bfloat16, and heads of up to 256 channels."""
    if config.model.attention != "cudnn":
        return
    _need(config, "model.dtype", lambda value: value == "bfloat16", "'bfloat16' for config.model.attention='cudnn'")
    heights = [image_size(config)[0] >> i for i in range(len(config.model.multipliers))]
    attended = [*(i for i, height in enumerate(heights) if height in config.model.attention_resolutions), -1]
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
    low, high = RANGES["data.image_size"]

    def is_size(value):
        sizes = value if isinstance(value, tuple | list) else [value, value]
        most = LONGEST if len(sizes) == 1 else high
        return len(sizes) in (1, 2, 3) and all(type(size) is int and low <= size <= most for size in sizes)

    others = f"(height, width); (length,) up to {LONGEST:,} for signals; (depth, height, width) for volumes"
    _need(config, "data.image_size", is_size, f"a number of pixels in {low}..{high:,}, or {others}")
    axes = len(image_size(config))
    if axes != 2:
        _need(config, "data.crop", lambda value: value == 0, "0 for signals and volumes, which are not cropped")
    if axes == 1:
        _need(config, "data.flip", lambda value: not value, "False for signals, which a flip would play backwards")


def _check_range(config):
    def is_range(value):
        are_numbers = all(type(x) in (int, float) and math.isfinite(x) for x in value)
        return value == () or (len(value) == 2 and are_numbers and value[0] < value[1])

    _need(config, "data.range", lambda value: is_range(tuple(value)), "() or two numbers (lo, hi) with lo < hi")


def _check_levels(config):
    try:
        check_image_size(image_size(config), len(config.model.multipliers))
    except ValueError as error:
        raise UserError(
            f"config.data.image_size={config.data.image_size} does not fit config.model.multipliers="
            f"{config.model.multipliers}: {error}"
        ) from None
