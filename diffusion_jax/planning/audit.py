"""An audit of a config: every setting beside that of Ho et al. (2020)."""

import math
import re

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import files
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.schedule import ho_linear

# Appendix B and the published code, for CIFAR-10, and for CelebA-HQ and LSUN at 256×256. Both sizes share _BOTH.
_BOTH = {
    "channels": 128,
    "residual blocks per level": 2,
    "heights of the levels with attention": [16],
    "attention blocks (down, middle, up)": [2, 1, 3],
    "groups of GroupNorm": [32],
    "classes": 0,
    "prediction": "eps_bar",
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
    "EMA warm-up": False,
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


def audit(config: ConfigDict, out: str | None = None) -> list[tuple[str, object, object, bool]]:
    """Prints the settings of a config beside Ho et al.'s for 32×32 or 256×256, whichever is nearer; marks departures.

    Args:
      out: a Markdown file for the table, or None.

    Returns:
      [(setting, ours, theirs, True if they agree)]. The parameters, attention blocks and groups are those of the
      network that the config describes, alpha_bar and beta those of its schedule.

    Raises:
      UserError: `out` cannot be written.
    """
    config = parts.with_classes(config)
    size = 32 if max(parts.image_shape(config)) <= 96 else 256
    ours, theirs = settings(config), _PAPER[size]
    theirs = dict.fromkeys(ours, "none") | theirs
    rows = [(name, ours[name], theirs[name], _agree(name, ours[name], theirs[name])) for name in ours]
    departures = sum(not agree for *_, agree in rows)
    cells = [(name, _text(a), _text(b), "" if agree else "**departs**") for name, a, b, agree in rows]
    lines = markdown_table(("setting", "this config", f"Ho et al. (2020), {size}×{size}", ""), cells)
    text = "\n".join([*lines, "", f"{departures} of {len(rows)} settings depart from Ho et al.'s."])
    print(text)
    if out:
        try:
            files.write_text(epath.Path(out).expanduser(), text + "\n")
        except OSError as error:
            raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another file") from None
    return rows


def settings(config: ConfigDict) -> dict[str, object]:
    """Returns the settings that `audit` compares."""
    run = parts.build(config)
    modules = run.abstract_state().params
    heights = [run.image_shape[0] >> level for level in range(len(config.model.multipliers))]
    widths = [config.model.channels * multiplier for multiplier in config.model.multipliers]
    beta_squared = np.asarray(run.schedule.beta[1:], np.float64) ** 2
    is_complete = run.num_sampling_steps == config.schedule.num_steps
    return {
        "parameters": parts.num_parameters(config),
        "channels": config.model.channels,
        "channels of the levels": list(config.model.multipliers),
        "residual blocks per level": config.model.num_res_blocks,
        "heights of the levels with attention": [h for h in heights if h in tuple(config.model.attention_resolutions)],
        "attention blocks (down, middle, up)": [
            sum(bool(re.match(rf"{part}\w*_attn_\d+$", name)) for name in modules) for part in ("down", "mid", "up")
        ],
        "groups of GroupNorm": sorted({math.gcd(config.model.num_groups, width) for width in widths}),
        "dropout": config.model.dropout,
        "classes": config.model.num_classes,
        **(_class_settings(config) if config.model.num_classes else {}),
        "prediction": config.model.prediction,
        "T": config.schedule.num_steps,
        "beta² of the first step": float(f"{beta_squared[0]:.6g}"),
        "beta² of the last step": float(f"{beta_squared[-1]:.6g}"),
        "alpha_bar of the last step": round(float(run.schedule.alpha_bar[-1]), 6),
        "beta² linear in t": bool(np.ptp(np.diff(beta_squared)) < 1e-6) if len(beta_squared) > 2 else True,
        "sigma": config.sampling.sigma,
        "clip of the predicted x_0 when sampling": config.sampling.clip,
        "sampler": f"{config.sampling.sampler}, {'all' if is_complete else run.num_sampling_steps} steps",
        "loss": f"{config.train.loss}, t {'uniform' if config.train.t_sampling == 'uniform' else 'by importance'}",
        "Adam's learning rate": config.train.learning_rate,
        "warm-up, steps": config.train.warmup_steps,
        "EMA decay": config.train.ema_decay,
        "EMA warm-up": config.train.ema_warmup,
        "largest norm of the gradient": config.train.grad_clip,
        "batch size": config.train.batch_size,
        "training steps": config.train.num_steps,
        "random flips": config.data.flip,
        "dtype of the computation": config.model.dtype,
    }


def _class_settings(config):
    """Returns the settings that a network without classes lacks."""
    interval = config.sampling.guidance_interval
    return {
        "label dropout": config.train.label_dropout,
        "guidance": config.sampling.guidance,
        "steps t with guidance": f"{interval[0]}..{interval[1]}" if interval else "all",
    }


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
