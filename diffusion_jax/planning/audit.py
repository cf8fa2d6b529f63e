"""How a configuration departs from Ho et al.'s (2020): every setting beside theirs."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diffusion_jax import from_config
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.schedule import ho_linear
from diffusion_jax.state import abstract_state

# Appendix B and the published code: CIFAR-10, and CelebA-HQ and LSUN at 256×256. What is the same in both stands once.
_BOTH = {
    "channels": 128,
    "residual blocks per level": 2,
    "heights of the levels with attention": [16],
    "attention blocks (down, middle, up)": [2, 1, 3],
    "groups of GroupNorm": [32],
    "step that the network sees for t": "t - 1",
    "prediction": "eps_bar",
    "initial kernels nearly 0": ["conv2", "conv_out", "proj_out"],
    "other initial kernels of variance 1 / fan_avg": True,
    "T": 1000,
    "beta² of the first step": 1e-4,
    "beta² of the last step": 0.02,
    "alpha_bar of the last step": round(float(ho_linear().alpha_bar[-1]), 6),
    "beta² linear in t": True,
    "clip of the predicted x_0 when sampling": True,
    "sampler": "ancestral, all steps",
    "loss": "simple, t uniform",
    "Adam's learning rate": 2e-4,
    "warm-up, steps": 5000,
    "EMA decay": 0.9999,
    "largest norm of the gradient": 1.0,
    "random flips": True,
    "dtype of the computation": "float32",
}
_PAPER = {
    32: _BOTH
    | {
        "parameters": 35_746_307,
        "channels of the levels": [1, 2, 2, 2],
        "dropout": 0.1,
        "sigma": "beta",
        "batch size": 128,
        "training steps": [800_000],
    },
    256: _BOTH
    | {
        "parameters": 113_673_219,
        "channels of the levels": [1, 1, 2, 2, 4, 4],
        "dropout": 0.0,
        "sigma": "posterior",
        "Adam's learning rate": 2e-5,
        "batch size": 64,
        "training steps": [500_000, 1_200_000, 1_800_000, 2_400_000],  # CelebA-HQ, church, cat, bedroom
    },
}


def audit(config, out: str | None = None) -> list[tuple[str, object, object, bool]]:
    """Prints the settings of a config beside Ho et al.'s for the nearer of 32×32 and 256×256, departures marked.

    Args:
      out: a file for the table, Markdown; None: none.

    Returns:
      [(setting, ours, theirs, whether they agree)]. Of these, parameters, attention blocks, groups, initial kernels
      and the step that it sees are read off the network that the config makes, alpha_bar and beta off its schedule.

    Raises:
      UserError: `out` cannot be written.
    """
    size = 32 if config.data.image_size <= 96 else 256
    ours, theirs = settings(config), _PAPER[size]
    rows = [(name, ours[name], theirs[name], _agree(name, ours[name], theirs[name])) for name in ours]
    departures = sum(not agree for *_, agree in rows)
    text = "\n".join(
        [
            f"| setting | this config | Ho et al. (2020), {size}×{size} | |",
            "| --- | --- | --- | --- |",
            *(f"| {name} | {_text(a)} | {_text(b)} | {'' if agree else '**departs**'} |" for name, a, b, agree in rows),
            "",
            f"{departures} of {len(rows)} settings depart from Ho et al.'s.",
        ]
    )
    print(text)
    if out:
        try:
            epath.Path(out).expanduser().write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another file") from None
    return rows


def settings(config) -> dict:
    """What `audit` compares, of a config."""
    params = abstract_state(config).params
    scales, seen = _initial_network(config)
    num_levels = len(config.model.multipliers)
    heights = [config.data.image_size >> level for level in range(num_levels)]
    widths = [config.model.channels * multiplier for multiplier in config.model.multipliers]
    s = from_config.schedule(config)
    beta_squared = np.asarray(s.beta[1:], np.float64) ** 2
    steps = config.sampling.steps or config.schedule.num_steps
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "channels": config.model.channels,
        "channels of the levels": list(config.model.multipliers),
        "residual blocks per level": config.model.num_res_blocks,
        "heights of the levels with attention": [h for h in heights if h in tuple(config.model.attention_resolutions)],
        "attention blocks (down, middle, up)": [
            sum(bool(re.match(rf"{part}\w*_attn_\d+$", name)) for name in params) for part in ("down", "mid", "up")
        ],
        "groups of GroupNorm": sorted({math.gcd(config.model.num_groups, width) for width in widths}),
        "dropout": config.model.dropout,
        "step that the network sees for t": seen,
        "prediction": config.model.prediction,
        "initial kernels nearly 0": _nearly_zero(scales),
        "other initial kernels of variance 1 / fan_avg": _variance_1(scales),
        "T": config.schedule.num_steps,
        "beta² of the first step": float(f"{beta_squared[0]:.6g}"),
        "beta² of the last step": float(f"{beta_squared[-1]:.6g}"),
        "alpha_bar of the last step": round(float(s.alpha_bar[-1]), 6),
        "beta² linear in t": bool(np.ptp(np.diff(beta_squared)) < 1e-6) if len(beta_squared) > 2 else True,
        "sigma": config.sampling.sigma,
        "clip of the predicted x_0 when sampling": config.sampling.clip,
        "sampler": f"{config.sampling.sampler}, {'all' if steps == config.schedule.num_steps else steps} steps",
        "loss": f"{config.train.loss}, t {'uniform' if config.train.t_sampling == 'uniform' else 'by importance'}",
        "Adam's learning rate": config.train.learning_rate,
        "warm-up, steps": config.train.warmup_steps,
        "EMA decay": config.train.ema_decay,
        "largest norm of the gradient": config.train.grad_clip,
        "batch size": config.train.batch_size,
        "training steps": config.train.num_steps,
        "random flips": config.data.flip,
        "dtype of the computation": config.model.dtype,
    }


_TINY = 1e-3  # of 1 / √fan_avg; Ho's nearly 0 is 1e-5


def _initial_network(config):
    """([(name, deviation in units of 1 / √fan_avg, size)] of the initial kernels, the step that it sees for t).

    The step is found in the output of the first layer that the time embedding enters; of the forward pass XLA
    keeps nothing else.
    """
    model, x, t = from_config.model(config), jnp.zeros((1, *from_config.image_shape(config))), jnp.ones(1, jnp.int32)

    def initial():
        variables = model.init(jax.random.key(config.seed), x, t)
        kernels = {path: leaf for path, leaf in jax.tree.leaves_with_path(variables["params"]) if leaf.ndim > 1}
        scales = [jnp.sqrt(jnp.mean(kernel**2) * _fan_avg(kernel.shape)) for kernel in kernels.values()]
        which = {"capture_intermediates": lambda module, _: module.name == "temb_dense0", "mutable": "intermediates"}
        _, found = model.apply(variables, x, 500 * t, **which)
        names.extend((path[-2].key, leaf.size) for path, leaf in kernels.items())
        first = variables["params"]["temb_dense0"]
        return scales, first, found["intermediates"]["temb_dense0"]["__call__"][0][0]

    names = []
    scales, first, output = jax.device_get(jax.jit(initial)())
    scales = [(name, float(scale), size) for (name, size), scale in zip(names, scales, strict=True)]
    return scales, _step_seen(first, output, 500)


def _fan_avg(shape):
    *window, inputs, outputs = shape
    return math.prod(window) * (inputs + outputs) / 2


def _step_seen(dense, output, t):
    """Which step near t has the embedding, Ho's, of which `dense` makes this output [4 channels]."""
    half = dense["kernel"].shape[0] // 2
    for offset in (0, -1, 1, -2, 2):
        angles = (t + offset) * np.exp(-math.log(1e4) * np.arange(half) / (half - 1))
        expected = np.concatenate([np.sin(angles), np.cos(angles)]) @ dense["kernel"] + dense["bias"]
        if np.abs(output - expected).max() < 0.02 * np.abs(expected).max():  # bfloat16 errs by 0.004
            return f"t {'-' if offset < 0 else '+'} {abs(offset)}" if offset else "t"
    return "none near t: another embedding"


def _nearly_zero(scales):
    """The kinds of kernels that are; with "some", where others of the kind are not."""
    found = []
    for kind in sorted({name for name, *_ in scales}):
        tiny = [scale < _TINY for name, scale, _ in scales if name == kind]
        if any(tiny):
            found.append(kind if all(tiny) else f"some {kind}")
    return found


def _variance_1(scales):
    """Whether the other kernels are as wide as their initialiser says, but for chance."""
    return all(abs(scale - 1) < max(0.02, 3 / math.sqrt(size)) for _, scale, size in scales if scale > _TINY)


def _agree(name, ours, theirs):
    if name == "training steps":
        return ours in theirs
    if name == "alpha_bar of the last step":
        return abs(ours - theirs) < 1e-6
    return ours == theirs


def _text(value):
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
