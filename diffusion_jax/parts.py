"""Builds the objects of a run from its config. The modules that compute never see a config.

Each builder takes the whole config, whose keys `configs/default.py` explains. `build` calls them all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diffusion_jax import losses, process, sampling, step, unet
from diffusion_jax import schedule as schedules
from diffusion_jax.data import cache, sources
from diffusion_jax.errors import UserError
from diffusion_jax.running import averages, gradients, measured
from diffusion_jax.running import config as configs
from diffusion_jax.running.measured import Measured

_SCHEDULES: dict[str, Callable[[int], schedules.Schedule]] = {
    "su_linear": schedules.su_linear,
    "ho_linear": schedules.ho_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
}
_SIGMAS = {
    "zero": schedules.sigma_zero,
    "beta": schedules.sigma_beta,
    "posterior": schedules.sigma_posterior,
    "learned": schedules.sigma_posterior,  # for those that take an array; the network gives its own to the chain
}
_GRIDS = {"uniform": sampling.grid_uniform, "quadratic": sampling.grid_quadratic, "log_snr": sampling.grid_log_snr}
_STEP_LOSSES = {"step": losses.step_loss, "weighted_step": losses.weighted_step_loss}
# model.prediction: (the formulas (s, x_t, t, output) -> ε̄ and -> x_0 for the network's output, (15) for that output).
_PREDICTIONS = {
    "eps_bar": (lambda s, x_t, t, output: output, process.predict_x_0, losses.simple_loss),
    "x_0": (process.predict_eps_bar, lambda s, x_t, t, output: output, losses.x_0_loss),
    "velocity": (process.predict_eps_bar_from_velocity, process.predict_x_0_from_velocity, losses.velocity_loss),
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_ATTENTION = {name: functools.partial(jax.nn.dot_product_attention, implementation=name) for name in ("xla", "cudnn")}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The objects of a run.

    Attributes:
      seed: seed of initial weights, order of the data, t, noise and dropout.
      schedule: α_t, β_t, ᾱ_t, β̄_t.
      sigma: [T + 1] standard deviations of the reverse steps.
      image_shape: (H, W, C), (L, C) of signals or (D, H, W, C) of volumes.
      model: the Flax network, which predicts model.prediction.
      num_classes: classes of the images, 0 without.
      network: apply_fn({"params": params}, x, t, labels=None) -> ε̄, for every model.prediction, or a
        `process.Prediction` (see `network`); labels int [B] in 0..num_classes, where num_classes is ∅, as is None.
      guided: the network as the sampler takes it, with sampling.guidance.
      optimizer: clipping and Adam.
      learning_rate: step -> learning rate.
      train_step: (state, (batch, indices)) -> (state, metrics), see `step.make_step`.
      num_averages: power-function averages in the state, for train.snapshot_every.
      clip: bounds of the predicted x_0 in the chain, or None.
      chain: the sampler, see `sampling.make_sample_fn`.
      num_samples: images per call of the sampler.
      num_sampling_steps: evaluations of the network for an image.
    """

    seed: int
    schedule: schedules.Schedule
    sigma: jax.Array
    image_shape: tuple[int, ...]
    model: unet.UNet
    num_classes: int
    network: Callable
    guided: Callable
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    train_step: Callable
    num_averages: int
    clip: tuple[float, float] | None
    chain: Callable
    num_samples: int
    num_sampling_steps: int

    def sample_fn(self, num: int | None = None, window: sampling.Window | None = None) -> Callable:
        """Returns sample_fn(params, rng, first=0, labels=None), see `sampling.make_sample_fn`."""
        shape = (num or self.num_samples, *self.image_shape)
        return sampling.make_sample_fn(
            self.guided, self.schedule, self.sigma, shape, self.clip, self.chain, window, self.num_classes
        )

    def indexed_sample_fn(self) -> Callable:
        """Returns sample(params, rng, indices [n], labels=None), see `sampling.make_indexed_sample_fn`."""
        return sampling.make_indexed_sample_fn(
            self.guided, self.schedule, self.sigma, self.image_shape, self.clip, self.chain
        )

    def init_state(self) -> step.TrainState:
        """Returns the state before the first step as NumPy arrays, see `step.init_state`."""
        return step.init_state(self.model, self.optimizer, self.image_shape, self.seed)

    def abstract_state(self) -> step.TrainState:
        """Returns the shapes and dtypes of the training state without its arrays."""
        return step.abstract_state(self.model, self.optimizer, self.image_shape, self.num_averages)


def build(config: ConfigDict, of_each_t: Measured | None = None) -> Parts:
    """Builds everything that a checked config describes, except the data set (see `images`).

    Raises:
      UserError: sampling.sigma=analytic or sampling.grid=bound without `of_each_t`.
    """
    if of_each_t is None and (key := measured.needed(config)):
        raise UserError(
            f"config.sampling.{key} needs what --mode=evaluate measures of a trained network: train with another, then "
            f"give --{key} to --mode=sample"
        )
    return Parts(
        seed=config.seed,
        schedule=schedule(config),
        sigma=sigma(config, of_each_t),
        image_shape=image_shape(config),
        model=model(config),
        num_classes=config.model.num_classes,
        network=network(config),
        guided=guided(config, config.sampling.guidance),
        optimizer=optimizer(config),
        learning_rate=learning_rate(config),
        train_step=train_step(config),
        num_averages=len(power_exponents(config)),
        clip=clip(config),
        chain=chain(config, of_each_t),
        num_samples=config.sampling.num,
        num_sampling_steps=num_sampling_steps(config),
    )


def schedule(config: ConfigDict) -> schedules.Schedule:
    """Builds the noise schedule, schedule.*.

    Raises:
      UserError: a schedule of the user has ᾱ_T = 0 for a network that predicts ε̄.
    """
    s = configs.resolve(config, "schedule", _SCHEDULES)(config.schedule.num_steps)
    s = schedules.shifted(s, config.schedule.log_snr_shift) if config.schedule.log_snr_shift else s
    s = schedules.zero_terminal(s) if config.schedule.zero_terminal else s
    if config.model.prediction == "eps_bar" and not np.asarray(s.alpha_bar)[-1]:
        raise UserError("alpha_bar_T is 0, where eps_bar tells nothing of x_0: give config.model.prediction=velocity")
    return s


def sigma(config: ConfigDict, of_each_t: Measured | None = None) -> jax.Array:
    """Builds the standard deviations of the reverse steps, float32 [T + 1], sampling.sigma."""
    if config.sampling.sigma == "analytic":
        return schedules.sigma_analytic(schedule(config), of_each_t.mean_square)  # type: ignore[union-attr]
    return configs.resolve(config, "sigma", _SIGMAS)(schedule(config))


def image_shape(config: ConfigDict) -> tuple[int, ...]:
    """Returns (H, W, C) of the images, (L, C) of signals or (D, H, W, C) of volumes."""
    return *configs.image_size(config), config.data.channels


def model(config: ConfigDict) -> unet.UNet:
    """Builds the network, model.*."""
    return unet.UNet(
        channels=config.model.channels,
        multipliers=tuple(config.model.multipliers),
        num_res_blocks=config.model.num_res_blocks,
        attention_resolutions=tuple(config.model.attention_resolutions),
        dropout=config.model.dropout,
        num_groups=config.model.num_groups,
        dtype=_DTYPES[config.model.dtype],
        attention=_ATTENTION[config.model.attention],
        remat=config.train.remat,
        num_classes=with_classes(config).model.num_classes,
        learned_sigma=config.model.learned_sigma,
    )


def network(config: ConfigDict) -> Callable:
    """Builds apply_fn({"params": params}, x, t, labels=None) -> ε̄, for every model.prediction; labels None is ∅.

    It returns a `process.Prediction` with x_0 if ᾱ_T is 0, and with sigma for sampling.sigma=learned.
    """
    apply, s = model(config).apply, schedule(config)

    def apply_fn(variables, x, t, labels=None):
        found = _prediction_fn(config, lambda x, t: apply(variables, x, t, labels=labels), s)(x, t)
        found = found if config.sampling.sigma == "learned" else found._replace(sigma=None)
        return found.eps_bar if found[1:] == (None, None) else found

    return apply_fn


def guided(config: ConfigDict, weight: float | jax.Array) -> Callable:
    """Builds the network with guidance of the weight w in sampling.guidance_interval, see `sampling.guided`.

    A call with labels is one call of the network on twice the images, and on as many for w = 1, and for w = 0 at all t.
    """
    apply_fn, num_classes, interval = network(config), config.model.num_classes, config.sampling.guidance_interval

    def guided_fn(variables, x, t, labels=None):
        if labels is None or ((is_known := isinstance(weight, int | float)) and weight == 1):
            return apply_fn(variables, x, t, labels)
        if is_known and weight == 0 and not interval:
            return apply_fn(variables, x, t)
        both = jnp.concatenate([labels, jnp.full_like(labels, num_classes)])
        of_both = apply_fn(variables, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = (jax.tree.map(lambda x: jnp.split(x, 2)[i], of_both) for i in (0, 1))  # noqa: B023
        return sampling.guided(lambda x, t: conditional, lambda x, t: unconditional, weight, interval or None)(x, t)

    return guided_fn


def _prediction_fn(config, output_fn, s):
    """Returns (x, t) -> Prediction for `output_fn`, the network with its own output."""
    to_eps_bar, to_x_0, _ = _PREDICTIONS[config.model.prediction]
    is_terminal = not np.asarray(s.alpha_bar)[-1]

    def of_example(x, t, output):
        sigma = None
        if config.model.learned_sigma:
            output, v = jnp.split(output, 2, axis=-1)
            sigma = process.interpolated_sigma(s, t, v)
        x_0 = to_x_0(s, x, t, output) if is_terminal else None
        return process.Prediction(to_eps_bar(s, x, t, output), x_0, sigma)

    return lambda x, t: jax.vmap(of_example)(x, t, output_fn(x, t))


def loss(config: ConfigDict) -> Callable:
    """Builds the training loss, train.loss: (output_fn, s, x_0, t, keys [B]) -> [B], see `losses.with_noise`.

    `output_fn(x, t)` is the raw output of the network, model.prediction.
    """
    if config.train.loss == "simple":
        return losses.with_noise(_PREDICTIONS[config.model.prediction][-1], 1)
    if config.train.loss in _STEP_LOSSES:
        of_network = losses.with_noise(_STEP_LOSSES[config.train.loss], 2)
    else:
        of_bound = {"vlb": lambda fn, s, *args: losses.vlb_loss(fn, s, sigma(config), *args)}
        of_network = losses.with_noise(configs.resolve(config, "loss", of_bound | {"hybrid": losses.hybrid_loss}), 1)
    is_bound = config.train.loss in ("vlb", "hybrid")

    def of_output(output_fn, s, *args):
        predict = _prediction_fn(config, output_fn, s)
        return of_network(predict if is_bound else lambda x, t: predict(x, t).eps_bar, s, *args)

    return of_output


def weight(config: ConfigDict) -> jax.Array | None:
    """Builds the weight of the training loss by t, float32 [T + 1], train.weight; None is 1."""
    if config.train.weight == "one":
        return None
    weight_of: Callable = losses.min_snr_weight if config.train.weight == "min_snr" else losses.p2_weight
    return weight_of(schedule(config), gamma=config.train.weight_gamma, prediction=config.model.prediction)


def t_probabilities(config: ConfigDict) -> np.ndarray | None:
    """Builds the probability of each t in training, float64 [T + 1], train.t_sampling; None means uniform in 1..T."""
    if config.train.t_sampling == "uniform":
        return None
    return losses.importance(schedule(config), sigma(config))


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Builds step -> learning rate: linear from 0 over train.warmup_steps, then constant."""
    if config.train.warmup_steps == 0:
        return optax.constant_schedule(config.train.learning_rate)
    return optax.linear_schedule(0.0, config.train.learning_rate, config.train.warmup_steps)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Builds Ho et al.'s optimizer: clipping by the global norm, then Adam (0.9, 0.999, 1e-8)."""
    return optax.chain(gradients.clip(config.train.grad_clip), optax.adam(learning_rate(config)))


def train_step(config: ConfigDict) -> Callable:
    """Builds the step of one device, see `step.make_step`."""
    return step.make_step(
        model(config).apply,
        lambda *args: loss(config)(*args),  # sampling does without a loss that only Python can give
        schedule(config),
        optimizer(config),
        config.train.ema_decay,
        config.seed,
        t_probabilities(config),
        flip=config.data.flip,
        accumulate=config.train.accumulate,
        deterministic=config.train.deterministic,
        ema_warmup=config.train.ema_warmup,
        learning_rate=learning_rate(config),
        num_classes=config.model.num_classes,
        label_dropout=config.train.label_dropout,
        weight=weight(config),
        power_exponents=power_exponents(config),
    )


def power_exponents(config: ConfigDict) -> tuple[float, ...]:
    """Returns the exponents of the averages beside the state, train.snapshot_every; () without."""
    return averages.EXPONENTS if config.train.snapshot_every else ()


def abstract_state(config: ConfigDict) -> step.TrainState:
    """Returns the shapes and dtypes of the training state; touches no device."""
    return step.abstract_state(model(config), optimizer(config), image_shape(config), len(power_exponents(config)))


def num_parameters(config: ConfigDict) -> int:
    """Counts the parameters of the network; touches no device."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_state(config).params))


def clip(config: ConfigDict) -> tuple[float, float] | None:
    """Returns the bounds of the predicted x_0 inside the chain, sampling.clip."""
    return (-1.0, 1.0) if config.sampling.clip else None


def num_sampling_steps(config: ConfigDict) -> int:
    """Returns the number of steps of the sampler, sampling.steps; 0 means all T."""
    return config.sampling.steps or config.schedule.num_steps


def chain(config: ConfigDict, of_each_t: Measured | None = None) -> Callable:
    """Builds the chain of `sampling.make_sample_fn` from sampling.sampler, steps, grid, eta and sigma=analytic."""
    if config.sampling.sampler == "ancestral":
        return sampling.reverse_chain
    s, num_steps, name = schedule(config), num_sampling_steps(config), config.sampling.grid
    is_ddim, eta = config.sampling.sampler == "ddim", config.sampling.eta
    if name == "bound":
        ts = sampling.grid_by_bound(s, of_each_t.squared_error, num_steps)  # type: ignore[union-attr]
    else:
        ts = _GRIDS[("uniform" if is_ddim else "log_snr") if name == "default" else name](s, num_steps)
    if is_ddim:
        of_analytic = of_each_t if config.sampling.sigma == "analytic" else None
        mean_square = of_analytic and of_analytic.mean_square
        return lambda eps_bar_fn, s, _, x, keys, **options: sampling.ddim_chain(
            eps_bar_fn, s, ts, x, keys, eta, mean_square=mean_square, **options
        )
    return lambda eps_bar_fn, s, _, x, keys, **options: sampling.dpmpp_2m_chain(
        eps_bar_fn, s, ts, x, keys=keys, eta=eta, **options
    )


def with_classes(config: ConfigDict) -> ConfigDict:
    """Returns the config with the number of classes that model.num_classes="auto" stands for; opens the source."""
    return config if config.model.num_classes != "auto" else configs.with_classes(config, source(config).classes)


def source(config: ConfigDict) -> sources.Source:
    """Opens the source of the images, data.source and data.path."""
    data, bounds, size = config.data, tuple(config.data.range) or None, configs.image_size(config)
    options = {"split": data.split, "manual_dir": data.manual_dir, "bounds": bounds, "channels": data.channels}
    return sources.open_source(data.source, data.path, size=None if len(size) == 2 else size, **options)


def images(config: ConfigDict, split: str | None = None) -> cache.Cached | cache.OnTheFly:
    """Opens the images of data.*, decoded to one size; the first call makes their cache.

    Args:
      split: replaces data.split.

    Raises:
      UserError: see `sources.open_source` and `cache.open_images`.
    """
    if split is not None:
        config = config.copy_and_resolve_references()
        config.data.split = split
    return cache.open_images(
        source(config),
        image_size=configs.image_size(config),
        channels=config.data.channels,
        crop=config.data.crop,
        skip_corrupt=config.data.skip_corrupt,
        cache_dir=config.data.cache_dir,
        cache_limit=config.data.cache_limit_gb * 1e9,
    )
