"""The one reader of a config: from keys to objects.

Only this module knows the names of schedules, losses and sigmas. Every function takes
the whole config (`configs/default.py` explains the keys).
"""

import difflib
import functools

import jax
import jax.numpy as jnp
import optax  # noqa: TID251 (makes the optimizer)
from ml_collections import ConfigDict  # noqa: TID251 (reads the config)

from diffusion_jax import data, losses, process, sampling, sources, unet
from diffusion_jax import schedule as schedules
from diffusion_jax.errors import UserError

_SCHEDULES = {"su_linear": schedules.su_linear, "ho_linear": schedules.ho_linear, "cosine": schedules.cosine}
_SIGMAS = {"zero": schedules.sigma_zero, "beta": schedules.sigma_beta, "posterior": schedules.sigma_posterior}
_SAMPLERS = ("ancestral", "ddim", "dpmpp_2m")
_STEP_LOSSES = {"step": losses.step_loss, "weighted_step": losses.weighted_step_loss}
# What the network predicts: how ε̄ follows from its output, formula(s, x_t, t, output), and its (15).
_PREDICTIONS = {
    "eps_bar": (lambda s, x_t, t, output: output, losses.simple_loss),
    "x_0": (process.predict_eps_bar, losses.x_0_loss),
    "velocity": (process.predict_eps_bar_from_velocity, losses.velocity_loss),
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_ATTENTION = {name: functools.partial(jax.nn.dot_product_attention, implementation=name) for name in ("xla", "cudnn")}


def schedule(config: ConfigDict) -> schedules.Schedule:
    """The noise schedule, schedule.*."""
    return _SCHEDULES[config.schedule.name](config.schedule.num_steps)


def sigma(config: ConfigDict):
    """float32 [T + 1], the standard deviations of the reverse steps, sampling.sigma."""
    return _SIGMAS[config.sampling.sigma](schedule(config))


def loss(config: ConfigDict):
    """The training loss, train.loss: (output_fn, s, x_0, t, keys [B]) -> [B], see `losses.with_noise`.

    `output_fn(x, t)` is the network as it stands, which predicts model.prediction.
    """
    _, simple = _PREDICTIONS[config.model.prediction]
    if config.train.loss == "simple":
        return losses.with_noise(simple, 1)
    if config.train.loss == "vlb":
        deviations = sigma(config)
        of_eps_bar = losses.with_noise(lambda fn, s, *args: losses.vlb_loss(fn, s, deviations, *args), 1)
    else:
        of_eps_bar = losses.with_noise(_STEP_LOSSES[config.train.loss], 2)
    return lambda output_fn, s, *args: of_eps_bar(_eps_bar_fn(config, output_fn, s), s, *args)


def t_probabilities(config: ConfigDict):
    """How often training draws each t, float64 [T + 1], train.t_sampling; None: uniformly in 1..T."""
    if config.train.t_sampling == "uniform":
        return None
    return losses.importance(schedule(config), sigma(config))


def network(config: ConfigDict):
    """The network as samplers see it: apply_fn({"params": params}, x, t) -> ε̄, whatever model.prediction is."""
    apply, s = model(config).apply, schedule(config)

    def apply_fn(variables, x, t):
        return _eps_bar_fn(config, lambda x, t: apply(variables, x, t), s)(x, t)

    return apply_fn


def _eps_bar_fn(config, output_fn, s):
    to_eps_bar, _ = _PREDICTIONS[config.model.prediction]
    return lambda x, t: jax.vmap(lambda x, t, output: to_eps_bar(s, x, t, output))(x, t, output_fn(x, t))


def model(config: ConfigDict) -> unet.UNet:
    """The network, model.*."""
    return unet.UNet(
        channels=config.model.channels,
        multipliers=tuple(config.model.multipliers),
        num_res_blocks=config.model.num_res_blocks,
        attention_resolutions=tuple(config.model.attention_resolutions),
        dropout=config.model.dropout,
        num_groups=config.model.num_groups,
        dtype=_DTYPES[config.model.dtype],
        attention=_ATTENTION[config.model.get("attention", "xla")],  # runs from before these keys have none
        remat=config.train.get("remat", False),
    )


def source(config: ConfigDict) -> sources.Source:
    """Where the images come from, data.source and data.path."""
    return sources.open_source(
        config.data.source, config.data.path, split=config.data.split, manual_dir=config.data.manual_dir
    )


def images(config: ConfigDict) -> data.Cached | data.OnTheFly:
    """The data set, data.*; makes its cache if there is none yet."""
    return data.open_images(
        source(config),
        image_size=config.data.image_size,
        channels=config.data.channels,
        crop=config.data.crop,
        skip_corrupt=config.data.skip_corrupt,
        cache_dir=config.data.cache_dir,
        cache_limit=config.data.cache_limit_gb * 1e9,
    )


def has_images(config: ConfigDict) -> bool:
    """Whether the config names images: an imported run's may not, and no training starts without."""
    return config.data.source != "files" or bool(config.data.path)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    return config.data.image_size, config.data.image_size, config.data.channels


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """step -> learning rate: linear from 0 over train.warmup_steps, then constant."""
    if config.train.warmup_steps == 0:
        return optax.constant_schedule(config.train.learning_rate)
    return optax.linear_schedule(0.0, config.train.learning_rate, config.train.warmup_steps)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Ho et al.'s: clipping by the global norm, then Adam (0.9, 0.999, 1e-8)."""
    return optax.chain(optax.clip_by_global_norm(config.train.grad_clip), optax.adam(learning_rate(config)))


def clip(config: ConfigDict) -> tuple[float, float] | None:
    """The bounds of the predicted x_0 inside the chain, sampling.clip."""
    return (-1.0, 1.0) if config.sampling.clip else None


def chain(config: ConfigDict):
    """The sampler, sampling.sampler over sampling.steps, for the `chain` of `sampling.make_sample_fn`."""
    s, name, num_steps = schedule(config), config.sampling.sampler, config.sampling.steps or config.schedule.num_steps
    if name == "ancestral":
        return sampling.reverse_chain
    if name == "ddim":
        ts, eta = sampling.grid_uniform(s, num_steps), config.sampling.eta
        return lambda eps_bar_fn, s, _, x, keys, **how: sampling.ddim_chain(eps_bar_fn, s, ts, x, keys, eta, **how)
    ts = sampling.grid_log_snr(s, num_steps)
    return lambda eps_bar_fn, s, _, x, keys, **how: sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, x, **how)


def describe_sampling(config: ConfigDict) -> dict:
    """What decides a sample besides parameters and key, in words: what the sampler does not use is None."""
    given, num_steps = config.sampling, config.schedule.num_steps
    return {
        "sampler": given.sampler,
        "steps": given.steps or num_steps,
        "schedule": f"{config.schedule.name}, T = {num_steps}",
        "eta": float(given.eta) if given.sampler == "ddim" else None,
        "sigma": given.sigma if given.sampler == "ancestral" else None,
        "clip": given.clip,
        "dtype": config.model.dtype,
    }


def check_sampling(config: ConfigDict) -> None:
    """Raises UserError if sampling.sampler, steps and eta do not fit each other or the schedule."""
    _one_of(config, "sampling.sampler", _SAMPLERS)
    _one_of(config, "model.dtype", _DTYPES)
    steps, num_steps = config.sampling.steps, config.schedule.num_steps
    _need(config, "sampling.steps", lambda value: 0 <= value <= num_steps, f"in 1..{num_steps}, or 0 for all")
    _need(config, "sampling.eta", lambda value: 0 <= value < float("inf"), "a number >= 0")
    if config.sampling.sampler == "ancestral" and steps not in (0, num_steps):
        raise UserError(
            f"config.sampling.steps={steps} does not fit config.sampling.sampler='ancestral', which takes all "
            f"{num_steps} steps: choose ddim or dpmpp_2m, or 0 steps"
        )


def sample_fn(config: ConfigDict, num: int | None = None, window: sampling.Window | None = None):
    """sample_fn(params, rng, first=0) -> float32 [num, H, W, C]; num defaults to sampling.num.

    See `sampling.make_sample_fn`.
    """
    shape = (num or config.sampling.num, *image_shape(config))
    return sampling.make_sample_fn(*_network_and_schedule(config), shape, **_how(config), window=window)


def sample(config: ConfigDict):
    """sample(params, rng, indices [n]) -> float32 [n, H, W, C] of any n, see `sampling.make_indexed_sample_fn`."""
    return sampling.make_indexed_sample_fn(*_network_and_schedule(config), image_shape(config), **_how(config))


def _network_and_schedule(config):
    return network(config), schedule(config), sigma(config)


def _how(config):
    return {"clip": clip(config), "chain": chain(config)}


def check(config: ConfigDict, reference: ConfigDict) -> None:
    """Raises UserError for the first key or value that cannot be used. Costs no time.

    Args:
      config: what the user gave.
      reference: a config with every key and a value of its type, `configs/default.py`'s.
    """
    _check_types(config, reference)
    for key, names in (
        ("schedule.name", _SCHEDULES),
        ("sampling.sigma", _SIGMAS),
        ("train.loss", ("simple", "vlb", *_STEP_LOSSES)),
        ("train.t_sampling", ("uniform", "importance")),
        ("model.prediction", _PREDICTIONS),
        ("model.attention", _ATTENTION),
    ):
        _one_of(config, key, names)
    _one_of(config, "data.channels", (1, 3))
    for key in _AT_LEAST_1:
        _need(config, key, lambda value: value >= 1, "an integer >= 1")
    for key in _AT_LEAST_0:
        _need(config, key, lambda value: value >= 0, "an integer >= 0")
    for key in ("train.learning_rate", "train.grad_clip"):
        _need(config, key, lambda value: 0 < value < float("inf"), "a number > 0")
    _need(config, "data.cache_limit_gb", lambda value: value >= 0, "a number >= 0")
    for key in ("model.dropout", "train.ema_decay"):
        _need(config, key, lambda value: 0 <= value < 1, "in [0, 1)")
    _need(config, "model.channels", lambda value: value >= 4 and value % 2 == 0, "an even number >= 4")
    for key in ("model.multipliers", "model.attention_resolutions"):
        _need(config, key, lambda value: all(isinstance(n, int) and n >= 1 for n in value), "integers >= 1")
    _need(config, "model.multipliers", lambda value: len(value) >= 1, "one multiplier a level, e.g. (1, 2, 2)")
    check_sampling(config)
    _check_vlb(config)
    _check_attention(config)
    _check_length(config)
    _check_image_size(config)


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
# What makes a run another run; the rest may change when it is resumed.
_IDENTITY = (
    *("data.source", "data.path", "data.split", "data.image_size", "data.channels", "data.crop"),
    *("schedule.", "model."),
)
_SAME_NETWORK = ("model.attention",)  # another way to the same output
# Of these, what an imported run may be given when its training begins.
_OF_TRAINING = ("data.source", "data.path", "data.split", "data.crop", "model.dropout")
_AT_LEAST_0 = (
    "seed",
    "data.crop",
    "train.warmup_steps",
    "train.max_bad_steps",
    "train.sample_every",
    "train.evaluate_every",
)


def _need(config, key, holds, wanted):
    value = flatten(config)[key]
    if not holds(value):
        raise UserError(f"config.{key}={value!r} must be {wanted}")


def _one_of(config, key, names):
    _need(config, key, lambda value: value in names, f"one of {', '.join(map(str, names))}")


def check_key(key: str, reference: ConfigDict) -> None:
    """Raises UserError, naming the nearest key, unless `key` ("train.loss") is one of the reference's."""
    keys = flatten(reference)
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
        raise UserError(f"config.{key} is no key of the config: the nearest is config.{near}")


def check_same_run(old: ConfigDict, new: ConfigDict, workdir) -> None:
    """Raises UserError, naming the keys, if the configs differ in network, schedule or data set.

    A run that was imported without images has no data set yet: it takes what `new` has.
    """
    chosen = has_images(old)
    old, new = flatten(old), flatten(new)
    changed = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if key.startswith(_IDENTITY)
        and key not in _SAME_NETWORK
        and (chosen or key not in _OF_TRAINING)
        and key in old
        and old[key] != new.get(key)  # runs from before a key was added go on
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds another run (config.{', config.'.join(changed)}): give another workdir, or the "
            "config of this one (if the same files have moved, correct its config.json)"
        )


def flatten(config: ConfigDict) -> dict:
    """{"seed": 0, "train.loss": "simple", ...}; lists as tuples."""
    flat = {}
    for name, section in config.items():
        entries = section.items() if isinstance(section, ConfigDict) else [(None, section)]
        for key, value in entries:
            flat[f"{name}.{key}" if key else name] = tuple(value) if isinstance(value, list) else value
    return flat


def _check_types(config, reference):
    """The keys of the reference, with values of their types; an int will do for a float."""
    given, wanted = flatten(config), flatten(reference)
    for key, value in given.items():
        check_key(key, reference)
        kind = type(wanted[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"config.{key}={value!r} must be of type {kind.__name__}")
    for key in wanted.keys() - given.keys():
        raise UserError(f"config.{key} is missing: start from configs/default.py")


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
    """What cuDNN's flash attention holds: heads of up to 256 channels, in bfloat16."""
    if config.model.attention != "cudnn":
        return
    _need(config, "model.dtype", lambda value: value == "bfloat16", "'bfloat16' for config.model.attention='cudnn'")
    levels = [config.data.image_size // 2**i for i in range(len(config.model.multipliers))]
    attended = [*(i for i, size in enumerate(levels) if size in config.model.attention_resolutions), -1]
    widest = config.model.channels * max(config.model.multipliers[i] for i in attended)  # -1: in the middle
    if widest > 256:
        raise UserError(
            f"config.model.attention='cudnn' holds up to 256 channels, and this network attends to {widest} "
            "(config.model.channels times config.model.multipliers): take 'xla'"
        )


def _check_length(config):
    examples = config.train.num_steps * config.train.batch_size
    if examples >= 2**32:
        raise UserError(
            f"config.train.num_steps={config.train.num_steps} of config.train.batch_size={config.train.batch_size} are "
            f"{examples:,} examples, and the order of the data has {2**32:,}: lower one of them"
        )


def _check_image_size(config):
    size, levels = config.data.image_size, len(config.model.multipliers)
    try:
        unet.check_image_size(size, size, levels)
    except ValueError as error:
        raise UserError(
            f"config.data.image_size={size} does not fit config.model.multipliers={config.model.multipliers}: {error}"
        ) from None
