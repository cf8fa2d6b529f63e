"""Networks in the format of Hugging Face's diffusers, in and out; Ho et al.'s own weights are published in it.

    unet/config.json · unet/diffusion_pytorch_model.safetensors · scheduler/scheduler_config.json

A `UNet2DModel` with the right settings is `unet.UNet`, weight for weight: names and layouts differ, and its
steps t are 0..T−1. Files are read and written by NumPy; diffusers and torch are not needed.
"""

import json
import math
import re

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import checkpoint, files
from diffusion_jax.running import config as configs
from diffusion_jax.running.workdir import absolute, read_config, write_config
from diffusion_jax.sample import ema_params
from diffusion_jax.step import TrainState

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler_config.json"
_PICKLE = (
    "weights in .bin, .pt or .ckpt are pickles, which can run code when they are read: have diffusers convert them "
    "with save_pretrained(folder, safe_serialization=True)"
)
# What diffusers (0.42) takes where config.json lacks a key, and what `unet.UNet` is.
_FIXED = {
    "act_fn": ("silu", ("silu", "swish")),
    "add_attention": (True, (True,)),
    "center_input_sample": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "flip_sin_to_cos": (True, (False,)),
    "freq_shift": (0.0, (1,)),
    "mid_block_scale_factor": (1.0, (1,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "norm_eps": (1e-5, (1e-6,)),
    "num_class_embeds": (None, (None,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "time_embedding_type": ("positional", ("positional",)),
    "upsample_type": ("conv", ("conv",)),
}
_UNET = {key: default for key, (default, _) in _FIXED.items()} | {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
    "num_train_timesteps": None,  # of learned embeddings
}
_MAY_BE_NULL = ("attention_head_dim", "mid_block_type")
_DDPM = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
_SCHEDULES = ("ho_linear", "su_linear", "cosine")
_PREDICTIONS = {"epsilon": "eps_bar", "sample": "x_0", "v_prediction": "velocity"}
_SIGMAS = {"fixed_large": "beta", "fixed_small_log": "posterior", "fixed_small": "posterior"}  # _log: another rounding
# Our modules and diffusers'; those of a level are in `_torch_name`.
_MODULES = {
    "conv_in": "conv_in",
    "temb_dense0": "time_embedding.linear_1",
    "temb_dense1": "time_embedding.linear_2",
    "mid_block_1": "mid_block.resnets.0",
    "mid_attn_1": "mid_block.attentions.0",
    "mid_block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.15


# ---------------------------------------------------------------- in


def import_diffusers(source: str, workdir: str, reference: ConfigDict) -> None:
    """Makes a workdir of a diffusers model: a config and a checkpoint of step 0, to sample, evaluate or train on.

    Args:
      source: a folder of a `UNet2DModel`, or of a pipeline with one in unet/; the .safetensors file itself, with
        its config.json beside it; or a repository of the Hugging Face hub, e.g. google/ddpm-cifar10-32.
      workdir: a new one.
      reference: what the weights do not determine is as here: data.*, train.*, model.dropout, and where there is no
        scheduler_config.json schedule.*, sampling.* and model.prediction; e.g. `configs/default.py`'s.

    Raises:
      UserError: the source cannot be read, is no network or schedule of this package, lacks a tensor, has one of
        another shape or one too many; or the workdir is not new.
    """
    workdir = _new_workdir(workdir)
    weights, scheduler = _find(source)
    config = reference.copy_and_resolve_references()
    _read_unet(config, weights.parent / "config.json")
    if scheduler is not None:
        _read_scheduler(config, scheduler)
    configs.check(config)
    params = _to_params(config, weights)
    opt_state = jax.device_get(parts.optimizer(config).init(params))
    state = TrainState(np.zeros((), np.int32), params, jax.tree.map(np.copy, params), opt_state)
    with checkpoint.open_manager(workdir) as manager:
        checkpoint.save(manager, 0, state)
    write_config(workdir, config)  # last: without it there is no run
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count:,} parameters of {source}, {config.schedule.name} of {config.schedule.num_steps} steps: {workdir}")


def _new_workdir(workdir):
    path = absolute(workdir)
    for name in ("config.json", "checkpoints"):
        if (path / name).exists():
            raise UserError(f"--workdir={workdir} holds a run already, or a part of one ({name}): give another workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({one_line(error)}): give another folder") from None
    return path


def _find(source):
    """(the weights, the scheduler's config or None), two files."""
    path = epath.Path(source).expanduser()
    if not path.exists():
        path = _download(source)
    if path.is_dir():
        files = [folder / _WEIGHTS for folder in (path / "unet", path)]
        weights = next((file for file in files if file.exists()), None)
        if weights is None:
            raise UserError(f"{source} holds no {_WEIGHTS}, neither there nor in unet/; {_PICKLE}")
    elif path.suffix == ".safetensors":
        weights = path
    else:
        raise UserError(f"{source} is no .safetensors file; {_PICKLE}")
    top = weights.parent.parent if weights.parent.name == "unet" else weights.parent
    files = [folder / _SCHEDULER for folder in (top / "scheduler", top, weights.parent)]
    return weights, next((file for file in files if file.exists()), None)


def _download(source):
    """The folder of a repository, fetched from the hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(f"{source} does not exist: give a folder, a .safetensors file or a repository as owner/name")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{source} is no folder here; if it is a repository of the Hugging Face hub: pip install huggingface_hub"
        ) from None
    names = ("config.json", _WEIGHTS, _SCHEDULER)
    patterns = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in names]
    try:
        return epath.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # requests', httpx's, the hub's own
        reason = one_line(error, 200)
        raise UserError(f"{source} is no folder here, and cannot be fetched from the hub ({reason})") from None


def _read_unet(config, file):
    """data.image_size, data.channels and model.*, but for its dropout, from the config.json of a UNet2DModel."""
    given = _read_json(file, "UNet2DModel", _UNET)
    for key, value in given.items():
        if key not in _UNET and value not in (None, False):
            _need(file, given, key, False, "is a key that is not known here")
    for key, (_, allowed) in _FIXED.items():
        _need(file, given, key, given[key] in allowed, f"must be {' or '.join(map(repr, allowed))} for this network")

    size, channels, groups = given["sample_size"], given["block_out_channels"], given["norm_num_groups"]
    size = size[0] if isinstance(size, list) and size == size[:1] * 2 else size
    _need(file, given, "sample_size", type(size) is int and size >= 1, "must be the height and width of square images")
    _need(file, given, "in_channels", given["in_channels"] in (1, 3), "must be 1 or 3")
    same = given["out_channels"] == given["in_channels"]
    _need(file, given, "out_channels", same, "must be as many as in_channels: a variance is not learned here")
    good = channels and all(type(n) is int and n >= 1 for n in channels) and all(n % channels[0] == 0 for n in channels)
    _need(file, given, "block_out_channels", good, "must be multiples of the first")
    good = type(groups) is int and groups >= 1 and all(n % groups == 0 for n in channels)
    _need(file, given, "norm_num_groups", good, f"must divide block_out_channels={channels}")
    _need(file, given, "attn_norm_num_groups", given["attn_norm_num_groups"] in (None, groups), f"must be {groups}")
    width = 4 * channels[0]
    _need(file, given, "time_embedding_dim", given["time_embedding_dim"] in (None, width), f"must be {width}")

    with_attention = _attention_levels(file, given)
    config.data.image_size, config.data.channels = size, given["in_channels"]
    config.model.channels, config.model.multipliers = channels[0], tuple(n // channels[0] for n in channels)
    config.model.num_res_blocks = given["layers_per_block"]
    config.model.attention_resolutions = tuple(size >> level for level in with_attention)
    config.model.num_groups = groups


def _attention_levels(file, given):
    """The levels with attention, which is to have one head."""
    channels, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    good = len(down) == len(channels) and all(name in ("DownBlock2D", "AttnDownBlock2D") for name in down)
    _need(file, given, "down_block_types", good, "must be DownBlock2D or AttnDownBlock2D, one a level")
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    _need(file, given, "up_block_types", [*up] == mirrored, f"must mirror down_block_types: {mirrored}")
    levels = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    widths = {channels[level] for level in levels} | {channels[-1]}  # the last is the middle's
    one_head = given["attention_head_dim"] is None or widths == {given["attention_head_dim"]}
    _need(file, given, "attention_head_dim", one_head, f"must be null or all {sorted(widths)} channels: one head")
    return levels


def _read_scheduler(config, file):
    """schedule.*, sampling.* and model.prediction from the config of a DDPMScheduler."""
    given = _read_json(file, "DDPMScheduler", _DDPM)
    for key in ("thresholding", "rescale_betas_zero_snr"):
        _need(file, given, key, given[key] is False, "must be false")
    good = not given["clip_sample"] or given["clip_sample_range"] == 1
    _need(file, given, "clip_sample_range", good, "must be 1.0")
    variance = given["variance_type"]
    _need(file, given, "variance_type", variance in _SIGMAS, f"must be one of {', '.join(_SIGMAS)}")
    prediction = given["prediction_type"]
    _need(file, given, "prediction_type", prediction in _PREDICTIONS, f"must be one of {', '.join(_PREDICTIONS)}")
    _need(file, given, "num_train_timesteps", given["num_train_timesteps"] >= 1, "must be at least 1")
    config.schedule.num_steps = given["num_train_timesteps"]
    config.schedule.name = _schedule_name(config, file, given)
    config.sampling.sigma, config.sampling.clip = _SIGMAS[variance], given["clip_sample"]
    config.sampling.sampler, config.sampling.steps = "ancestral", 0
    config.model.prediction = _PREDICTIONS[prediction]


def _schedule_name(config, file, given):
    """The schedule.name whose β_t² are the scheduler's."""
    key, num_steps = "beta_schedule", config.schedule.num_steps
    if given["trained_betas"] is not None:
        key, wanted = "trained_betas", given["trained_betas"]
        good = isinstance(wanted, list) and all(type(number) in (int, float) for number in wanted)
        _need(file, given, key, good, "must be a list of numbers")
    elif given[key] == "linear":
        wanted = np.linspace(given["beta_start"], given["beta_end"], num_steps)
    elif given[key] == "squaredcos_cap_v2":
        return "cosine"  # the same formula
    else:
        wanted = []
    for name in _SCHEDULES:
        beta_squared = _beta_squared(config, name)
        if np.shape(wanted) == beta_squared.shape and np.allclose(wanted, beta_squared, rtol=1e-5, atol=0):
            return name
    from_to = f"of {num_steps} steps from {given['beta_start']} to {given['beta_end']} "
    why = f"{'' if key == 'trained_betas' else from_to}is none of the schedules {', '.join(_SCHEDULES)}"
    _need(file, given, key, False, why)


def _beta_squared(config, name):
    """Ho's β_t of a schedule, float64 [T]."""
    other = ConfigDict({"schedule": {"name": name, "num_steps": config.schedule.num_steps}})
    return np.asarray(parts.schedule(other).beta, np.float64)[1:] ** 2


def _need(file, given, key, holds, wanted):
    if not holds:
        value = f"{given[key]!r}"
        value = value if len(value) < 200 else f"{value[:60]} … {value[-20:]}"
        raise UserError(f"{file} has {key}={value}, which {wanted}")


def _read_json(file, class_name, defaults):
    """What a config of diffusers gives, with its defaults; private keys are left out."""
    try:
        content = json.loads(file.read_text())
        given = dict(content.items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no config of diffusers ({one_line(error, 200)}): restore it") from None
    given.setdefault("_class_name", class_name)
    _need(file, given, "_class_name", given["_class_name"] == class_name, f"must be {class_name}")
    given = defaults | {key: value for key, value in given.items() if not key.startswith("_")}
    for key, default in defaults.items():
        kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
        good = type(given[key]) in kinds or default is None or (given[key] is None and key in _MAY_BE_NULL)
        _need(file, given, key, good, f"must be of type {kinds[0].__name__}")
    return given


# ---------------------------------------------------------------- weights


def _to_params(config, file):
    """The parameters of the network, nested dicts of float32 arrays, from a file of diffusers' tensors."""
    tensors = _read_tensors(file)
    params = {}
    for name, (keys, shape) in _layout(config).items():
        if name not in tensors:
            raise UserError(
                f"{file} lacks the tensor {name}, {_torch_shape(name, shape)}: it is not of this config.json"
            )
        params[keys] = _to_flax(file, name, tensors.pop(name), shape)
    if tensors:
        some = ", ".join(sorted(tensors)[:5]) + (", …" if len(tensors) > 5 else "")
        raise UserError(f"{file} has {len(tensors)} tensors that are not in this network: {some}")
    return unflatten_dict(params)


def _read_tensors(file):
    """{name: array}, with the names of today's diffusers."""
    try:
        tensors = safetensors.load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read, or is damaged ({one_line(error, 200)}): fetch it again") from None
    except KeyError as error:
        raise UserError(f"{file} has tensors of type {one_line(error)}: convert them to float32") from None
    old = re.compile(rf"(?<=\.)({'|'.join(_OLD_PARTS)})(?=\.(weight|bias)$)")
    return {old.sub(lambda match: _OLD_PARTS[match[0]], name): array for name, array in tensors.items()}


def _layout(config):
    """{diffusers' name: (keys, shape)} of every parameter of the network."""
    levels = len(config.model.multipliers)
    layout = {}
    for keys, leaf in flatten_dict(parts.abstract_state(config).params).items():
        layout[_torch_name(keys, levels)] = keys, leaf.shape
    return layout


def _torch_name(keys, levels):
    module, *parts, leaf = keys
    if module not in _MODULES:
        side, level, kind, *index = module.split("_")
        level = int(level) if side == "down" else levels - 1 - int(level)
        kind = {"block": "resnets", "attn": "attentions"}.get(kind, f"{kind}rs")  # downsample: downsamplers
        module = f"{side}_blocks.{level}.{kind}.{index[0] if index else '0.conv'}"
    else:
        module = _MODULES[module]
    return ".".join([module, *(_PARTS.get(part, part) for part in parts), "bias" if leaf == "bias" else "weight"])


def _torch_shape(name, shape):
    """Torch's shape of a parameter: kernels are [out, in, height, width], a dense one [out, in]."""
    if len(shape) == 4:
        return tuple(shape[i] for i in (3, 2, 0, 1))
    return (*shape[::-1], *((1, 1) if name.endswith("conv_shortcut.weight") else ()))


def _to_torch(name, array):
    transposed = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.ascontiguousarray(transposed.reshape(_torch_shape(name, array.shape)))


def _to_flax(file, name, array, shape):
    """A dense kernel may be a 1×1 convolution, or the other way round."""
    wanted = _torch_shape(name, shape)
    dense = len(shape) == 2 and array.shape in (wanted[:2], (*wanted[:2], 1, 1))
    if not (dense or array.shape == wanted) or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{file} has {name} as {array.dtype} {array.shape}, not float32 {wanted}")
    array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.reshape(wanted[: len(shape)]).T
    return np.array(array, np.float32, order="C")


# ---------------------------------------------------------------- out


def export_diffusers(workdir: str, out: str) -> None:
    """Writes the averaged parameters of the last checkpoint for diffusers' `DDPMPipeline.from_pretrained(out)`.

    The pipeline's chain is the ancestral one with the run's sigma, whatever its sampling.sampler is. Schedules
    other than Ho's are written as `trained_betas`.

    Raises:
      UserError: no run, no checkpoint; sampling.sigma is zero; the network is none of diffusers'; `out` is not a
        new folder.
    """
    config = read_config(workdir)
    _unet_config(config)  # refuses before anything is written
    configs = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        f"scheduler/{_SCHEDULER}": _scheduler_config(config),
    }
    step, params = ema_params(parts.build(config), workdir)
    folder = epath.Path(out).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out={out} is there already: give a new folder")
        write_unet(config, params, folder / "unet")
        for name, content in configs.items():
            files.write_text(folder / name, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another folder") from None
    print(f"diffusers model of step {step}: {out}")
    if (num_steps := config.schedule.num_steps) != 1000:
        print(f"DDPMPipeline takes 1000 steps unless told otherwise: call it with num_inference_steps={num_steps}")


def write_unet(config: ConfigDict, params, folder: epath.Path) -> None:
    """Writes a UNet2DModel of diffusers: its config and its weights. UserError if it has no such network."""
    unet_config = _unet_config(config)
    flat = flatten_dict(params)
    tensors = {name: _to_torch(name, flat[keys]) for name, (keys, _) in _layout(config).items()}
    with files.replacing(folder / _WEIGHTS) as file:
        file.write(safetensors.save(tensors, {"format": "pt"}))
    files.write_text(folder / "config.json", json.dumps(unet_config, indent=2) + "\n")


def _unet_config(config):
    """The config.json of the UNet2DModel that the run's network is."""
    size, model = config.data.image_size, config.model
    if model.multipliers[0] != 1:
        raise UserError(f"config.model.multipliers={model.multipliers} does not begin with 1, as diffusers has it")
    attention = [size >> level in model.attention_resolutions for level in range(len(model.multipliers))]
    return {
        "_class_name": "UNet2DModel",
        **{key: allowed[0] for key, (_, allowed) in _FIXED.items()},
        "sample_size": size,
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "block_out_channels": [model.channels * n for n in model.multipliers],
        "down_block_types": ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in attention],
        "up_block_types": ["AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attention)],
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "attention_head_dim": None,
        "norm_num_groups": _num_groups(config),
    }


def _num_groups(config):
    """The one number of groups of all normalisations: `unet.GroupNorm` takes what divides the channels."""
    scales = [shape for keys, shape in _layout(config).values() if keys[-1] == "scale"]
    groups = {math.gcd(config.model.num_groups, channels) for (channels,) in scales}
    if len(groups) > 1:
        raise UserError(
            f"config.model.num_groups={config.model.num_groups} makes {sorted(groups)} groups in this network, and "
            "diffusers has one number for all: only networks whose channels it divides can be exported"
        )
    return groups.pop()


def _scheduler_config(config):
    """The config of the DDPMScheduler that takes the run's steps."""
    variances = {sigma: variance for variance, sigma in _SIGMAS.items()}
    if config.sampling.sigma not in variances:
        raise UserError(
            f"config.sampling.sigma={config.sampling.sigma!r} is none of diffusers' DDPMScheduler: change it in the "
            f"run's config.json to one of {', '.join(variances)}"
        )
    ho = config.schedule.name == "ho_linear"
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    return {
        "_class_name": "DDPMScheduler",
        **_DDPM,
        "num_train_timesteps": config.schedule.num_steps,
        "trained_betas": None if ho else _beta_squared(config, config.schedule.name).tolist(),
        "variance_type": variances[config.sampling.sigma],
        "clip_sample": config.sampling.clip,
        "prediction_type": predictions[config.model.prediction],
    }
