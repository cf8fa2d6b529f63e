"""Import and export of networks in the format of Hugging Face's diffusers, in which Ho et al.'s weights are published.

    unet/config.json · unet/diffusion_pytorch_model.safetensors · scheduler/scheduler_config.json

A `UNet2DModel` with the right settings is `unet.UNet`, weight for weight; only names, layouts and its steps
t = 0..T−1 differ. This module needs neither diffusers nor torch.
"""

import functools
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
from diffusion_jax.configs import default as default_config
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.interop.card import model_card
from diffusion_jax.running import checkpoint, files, history, hosts
from diffusion_jax.running import config as configs
from diffusion_jax.running.workdir import absolute, read_config, write_config
from diffusion_jax.sample import ema_params
from diffusion_jax.step import TrainState

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler_config.json"
_PICKLE = (
    "weights in .bin, .pt or .ckpt are pickles, which can run code when they are read: convert them with diffusers' "
    "save_pretrained(folder, safe_serialization=True)"
)
_WITHOUT_NULL = (
    "{:,} classes and no embedding of no class, which gets zeros: p(x) is untrained, so a guidance other than 1 means "
    "nothing until the run trains on (if the last embedding is that of no class, import with model.num_classes={})"
)
# Settings that `unet.UNet` fixes: (default of diffusers 0.42, accepted values).
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
    "num_class_embeds": None,
    "_num_classes": None,  # in our exports alone: the embeddings are those of so many classes and, last, of ∅
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
_SCHEDULES = ("ho_linear", "su_linear", "cosine", "sigmoid")
_PREDICTIONS = {"epsilon": "eps_bar", "sample": "x_0", "v_prediction": "velocity"}
# fixed_small_log differs from fixed_small by rounding.
_SIGMAS = {
    "fixed_large": "beta",
    "fixed_small_log": "posterior",
    "fixed_small": "posterior",
    "learned_range": "learned",
}
# Our names of modules: names in diffusers. `_torch_name` translates those of the levels.
_MODULES = {
    "conv_in": "conv_in",
    "class_embedding": "class_embedding",
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
_CLASSES = "class_embedding.weight"  # [num_class_embeds, features] in both, a table that is not transposed
_OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


# ---------------------------------------------------------------- import


def import_diffusers(source: str, workdir: epath.PathLike, reference: ConfigDict | None = None) -> None:
    """Makes a workdir from a diffusers model: a config and a checkpoint of step 0, to sample, evaluate or train.

    The workdir appears whole or not at all. Of several processes the first writes it.

    Args:
      source: a folder of a `UNet2DModel`, or of a pipeline with one in unet/; the .safetensors file itself, with
        its config.json beside it; or a repository of the Hugging Face hub, e.g. google/ddpm-cifar10-32.
      workdir: a new workdir.
      reference: a config for everything that the model does not determine: data.*, train.*, model.dropout, and,
        without a scheduler_config.json, schedule.*, sampling.* and model.prediction. Of n class embeddings the last
        is that of ∅ if its model.num_classes is n − 1 (for "auto": if its images have n − 1 classes), or if the
        model is an export of this package. Otherwise all are classes, ∅ gets zeros, and sampling.guidance is 1.
        None is configs/default.py without dropout.

    Raises:
      UserError: the source cannot be read, its network or schedule is not one of this package or beyond
        `config.RANGES`, its tensors do not match the network or are not finite, or the workdir is not new.
    """
    if reference is None:
        reference = default_config.get_config()
        reference.model.dropout = 0.0  # sampling needs none; training takes a config
    hosts.on_main(lambda: _import(source, _new_workdir(workdir), reference))


def _import(source, workdir, reference):
    weights, scheduler = _find(source)
    config = reference.copy_and_resolve_references()
    has_null = _read_unet(config, weights.parent / "config.json")
    if scheduler is not None:
        _read_scheduler(config, scheduler)
    configs.check(config)
    params = _to_params(config, weights, has_null)
    opt_state = jax.device_get(parts.optimizer(config).init(params))
    state = TrainState(np.zeros((), np.int32), params, jax.tree.map(np.copy, params), opt_state)
    run = history.new_identity()
    try:
        with files.new_folder(workdir) as folder:
            (folder / "checkpoints").mkdir()
            with checkpoint.open_manager(folder, alone=True) as manager:
                checkpoint.save(manager, 0, state, history.about(run, config))
            history.record(folder, run, 0, config)
            write_config(folder, config)  # last: a workdir without it holds no run
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({one_line(error)}): give another folder") from None
    count, schedule = sum(leaf.size for leaf in jax.tree.leaves(params)), config.schedule
    print(f"imported {count:,} parameters of {source}, {schedule.name} of {schedule.num_steps} steps: {workdir}")
    if n := config.model.num_classes:
        print(f"{n:,} classes; the last embedding is that of no class" if has_null else _WITHOUT_NULL.format(n, n - 1))


def _new_workdir(workdir):
    path = absolute(workdir)
    names = sorted(file.name for file in path.iterdir()) if path.exists() else []
    if names:
        holds = ", ".join(names[:3])
        raise UserError(f"--workdir={workdir} holds a run already, or other files ({holds}): give another workdir")
    files.check_writable(path, f"--workdir={workdir}")
    return path


def _find(source):
    """Returns two files: the weights, and the scheduler's config or None."""
    path = epath.Path(source).expanduser()
    path = path if path.exists() else _download(source)
    weights = path if path.is_file() else _first_file([path / "unet" / _WEIGHTS, path / _WEIGHTS])
    if weights is None or weights.suffix != ".safetensors":
        raise UserError(f"{source} is not a .safetensors file, nor a folder with (unet/){_WEIGHTS}; {_PICKLE}")
    top = weights.parent.parent if weights.parent.name == "unet" else weights.parent
    return weights, _first_file([folder / _SCHEDULER for folder in (top / "scheduler", top, weights.parent)])


def _first_file(paths):
    return next((path for path in paths if path.exists()), None)


def _download(source):
    """Fetches a repository from the hub and returns its folder."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(f"{source} does not exist: give a folder, a .safetensors file or a repository as owner/name")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{source} is not a folder here; to fetch it from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    names = ("config.json", _WEIGHTS, _SCHEDULER)
    patterns = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in names]
    try:
        return epath.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # requests, httpx and the hub raise types of their own
        reason = one_line(error, 200)
        raise UserError(f"{source} is not a folder here, and cannot be fetched from the hub ({reason})") from None


def _read_unet(config, file):
    """Sets data.image_size, data.channels and model.*, except the dropout, from the config.json of a UNet2DModel.

    Returns:
      True if the last class embedding is that of ∅, or there are no classes.
    """
    settings, require = _read_json(file, "UNet2DModel", _UNET)
    for key, value in settings.items():
        require(key, key in _UNET or value in (None, False), "is not a known key")
    for key, (_, allowed) in _FIXED.items():
        require(key, settings[key] in allowed, f"must be {' or '.join(map(repr, allowed))} for this network")

    size, channels, groups = settings["sample_size"], settings["block_out_channels"], settings["norm_num_groups"]
    sizes = [size, size] if type(size) is int else size
    are_sizes = isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and n >= 1 for n in sizes)
    require("sample_size", are_sizes, "must be a number of pixels, or [height, width]")
    _bound(require, "sample_size", max(sizes), "data.image_size")
    is_number = type(settings["in_channels"]) is int and settings["in_channels"] >= 1
    require("in_channels", is_number, "must be a number of channels")
    _bound(require, "in_channels", settings["in_channels"], "data.channels")
    times = settings["out_channels"] / settings["in_channels"]
    require("out_channels", times in (1, 2), "must be in_channels, or twice as many with learned variances")
    are_multiples = channels and all(type(n) is int and n >= 1 and n % channels[0] == 0 for n in channels)
    require("block_out_channels", are_multiples, "must be multiples of the first")
    _bound(require, "block_out_channels", max(channels), "model.channels")
    layers = settings["layers_per_block"]
    _bound(require, "layers_per_block", layers, "model.num_res_blocks")
    least = int(len({*channels}) > 1)  # the blocks on the way down change the channels
    require("layers_per_block", layers >= least, f"must be at least {least} for block_out_channels={channels}")
    divides_all = type(groups) is int and groups >= 1 and all(n % groups == 0 for n in channels)
    require("norm_num_groups", divides_all, f"must divide block_out_channels={channels}")
    require("attn_norm_num_groups", settings["attn_norm_num_groups"] in (None, groups), f"must be {groups}")
    width = 4 * channels[0]
    require("time_embedding_dim", settings["time_embedding_dim"] in (None, width), f"must be {width}")

    attention_levels = _attention_levels(settings, require)
    height, width = sizes
    with config.ignore_type():  # a number or a pair
        config.data.image_size = height if height == width else (height, width)
    config.data.channels = settings["in_channels"]
    config.model.channels, config.model.multipliers = channels[0], tuple(n // channels[0] for n in channels)
    config.model.num_res_blocks = layers
    config.model.attention_resolutions = tuple(height >> level for level in attention_levels)
    config.model.num_groups = groups
    config.model.learned_sigma = times == 2
    if times == 2:
        config.train.loss, config.sampling.sigma, config.model.prediction = "hybrid", "learned", "eps_bar"
    return _read_classes(config, settings, require)


def _read_classes(config, settings, require):
    """Sets model.num_classes and data.classes. Returns True if the last embedding is that of ∅, or there are none."""
    n, wanted, names = settings["num_class_embeds"], config.model.num_classes, config.data.classes
    has_null, num_classes = True, 0
    if n is not None:
        require("num_class_embeds", type(n) is int and 1 <= n <= 2**16 + 1, "must be null or an integer in 1..65,537")
        is_export = settings["_num_classes"] is not None
        require("_num_classes", settings["_num_classes"] in (None, n - 1), f"must be num_class_embeds - 1, {n - 1:,}")
        if wanted == "auto":  # of the images, if the reference names any
            names = parts.source(config).classes if configs.has_images(config) else ()
            wanted = len(names)
        fits = wanted in ((0, n - 1) if is_export else (0, n - 1, n))
        choice = f"{n - 1:,}" if is_export else f"{n - 1:,} if the last embedding is that of no class, or {n:,}"
        require("num_class_embeds", fits, f"does not fit config.model.num_classes={wanted}: give {choice}")
        has_null = is_export or 0 < wanted == n - 1
        num_classes = n - has_null
    with config.ignore_type():
        config.model.num_classes = num_classes
    config.data.classes = tuple(names) if len(names) == num_classes else ()
    if not has_null:
        config.sampling.guidance = 1.0
    return has_null


def _bound(require, key, value, ours):
    """Refuses a value above the bound of `ours`, a key of our config, before it takes any memory."""
    require(key, value <= configs.RANGES[ours][1], f"must be at most {configs.RANGES[ours][1]:,}")


def _attention_levels(settings, require):
    """Returns the levels with attention; it must have a single head."""
    channels, down, up = settings["block_out_channels"], settings["down_block_types"], settings["up_block_types"]
    are_known = len(down) == len(channels) and all(name in ("DownBlock2D", "AttnDownBlock2D") for name in down)
    require("down_block_types", are_known, "must be DownBlock2D or AttnDownBlock2D, one for each level")
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    require("up_block_types", [*up] == mirrored, f"must mirror down_block_types: {mirrored}")
    levels = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    widths = {channels[level] for level in levels} | {channels[-1]}  # the middle has the channels of the last level
    is_one_head = settings["attention_head_dim"] is None or widths == {settings["attention_head_dim"]}
    require("attention_head_dim", is_one_head, f"must be null or all {sorted(widths)} channels: one head")
    return levels


def _read_scheduler(config, file):
    """Sets schedule.*, sampling.* and model.prediction from the config of a DDPMScheduler."""
    settings, require = _read_json(file, "DDPMScheduler", _DDPM)
    require("thresholding", settings["thresholding"] is False, "must be false")
    is_unit_range = not settings["clip_sample"] or settings["clip_sample_range"] == 1
    require("clip_sample_range", is_unit_range, "must be 1.0")
    for key, names in (("variance_type", _SIGMAS), ("prediction_type", _PREDICTIONS)):
        require(key, settings[key] in names, f"must be one of {', '.join(names)}")
    require("num_train_timesteps", settings["num_train_timesteps"] >= 1, "must be at least 1")
    _bound(require, "num_train_timesteps", settings["num_train_timesteps"], "schedule.num_steps")
    knows_x_0 = settings["prediction_type"] != "epsilon"
    require(
        "rescale_betas_zero_snr", knows_x_0 or not settings["rescale_betas_zero_snr"], "needs v_prediction or sample"
    )
    is_learned = settings["variance_type"] == "learned_range"
    require("variance_type", is_learned == config.model.learned_sigma, "does not go with out_channels of the network")
    config.schedule.num_steps, config.schedule.log_snr_shift = settings["num_train_timesteps"], 0.0
    config.schedule.zero_terminal = settings["rescale_betas_zero_snr"]
    config.schedule.name = _schedule_name(settings, require)
    config.sampling.sigma, config.sampling.clip = _SIGMAS[settings["variance_type"]], settings["clip_sample"]
    config.sampling.sampler, config.sampling.steps, config.sampling.grid = "ancestral", 0, "default"
    config.model.prediction = _PREDICTIONS[settings["prediction_type"]]


def _schedule_name(settings, require):
    """Returns the schedule.name whose β_t² are those of the scheduler."""
    num_steps, start, end = (settings[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    key, conditions, betas = "trained_betas", "", settings["trained_betas"]
    if betas is not None:
        are_numbers = isinstance(betas, list) and all(type(number) in (int, float) for number in betas)
        require(key, are_numbers, "must be a list of numbers")
    else:
        key, conditions = "beta_schedule", f"with {num_steps} steps from {start} to {end} "
        if settings[key] == "squaredcos_cap_v2":
            return "cosine"  # the same formula
        betas = np.linspace(start, end, num_steps) if settings[key] == "linear" else []
    for name in _SCHEDULES:
        beta_squared = _beta_squared(name, num_steps)
        if np.shape(betas) == beta_squared.shape and np.allclose(betas, beta_squared, rtol=1e-5, atol=0):
            return name
    require(key, False, f"{conditions}is none of the schedules {', '.join(_SCHEDULES)}")


def _beta_squared(name, num_steps, log_snr_shift=0.0):
    """Returns Ho's β_t of a schedule before schedule.zero_terminal, as diffusers takes them, float64 [T]."""
    settings = {"name": name, "num_steps": num_steps, "log_snr_shift": log_snr_shift, "zero_terminal": False}
    config = ConfigDict({"schedule": settings, "model": {"prediction": "velocity"}})
    return np.asarray(parts.schedule(config).beta, np.float64)[1:] ** 2


def _read_json(file, class_name, defaults):
    """Returns (settings, require): a diffusers config without private keys, with defaults; and `_require` for it."""
    try:
        settings = dict(json.loads(file.read_text()).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a config of diffusers ({one_line(error, 200)}): restore it") from None
    settings.setdefault("_class_name", class_name)
    _require(file, settings, "_class_name", settings["_class_name"] == class_name, f"must be {class_name}")
    settings = defaults | {key: value for key, value in settings.items() if key in defaults or key[:1] != "_"}
    require = functools.partial(_require, file, settings)
    for key, default in defaults.items():
        types = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
        is_null = settings[key] is None and key in _MAY_BE_NULL
        require(key, type(settings[key]) in types or default is None or is_null, f"must be of type {types[0].__name__}")
    return settings, require


def _require(file, settings, key, condition, reason):
    """Raises UserError, "… which {reason}", if the condition is false."""
    if not condition:
        raise UserError(f"{file} has {key}={settings[key]!r:.200}, which {reason}")


# ---------------------------------------------------------------- weights


def _to_params(config, file, has_null=True):
    """Returns the parameters of the network, nested dicts of float32 arrays, from a file of diffusers' tensors.

    Args:
      has_null: False if the file has no embedding of ∅, which gets zeros.
    """
    tensors = _read_tensors(file)
    params = {}
    for name, (keys, shape) in _layout(config).items():
        added = int(name == _CLASSES and not has_null)
        shape = (shape[0] - 1, shape[1]) if added else shape
        if name not in tensors:
            raise UserError(
                f"{file} lacks the tensor {name}, {_torch_shape(name, shape)}: give the config.json of these weights"
            )
        array = _to_flax(file, name, tensors.pop(name), shape)
        params[keys] = np.pad(array, ((0, 1), (0, 0))) if added else array
    if tensors:
        names = ", ".join(sorted(tensors)[:5]) + (", …" if len(tensors) > 5 else "")
        raise UserError(f"{file} has {len(tensors)} tensors that are not in this network: {names}")
    return unflatten_dict(params)


def _read_tensors(file):
    """Returns {name: array}, with old names replaced by those of diffusers 0.15 and later."""
    try:
        tensors = safetensors.load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read, or is damaged ({one_line(error, 200)}): fetch it again") from None
    except KeyError as error:
        raise UserError(f"{file} has tensors of type {one_line(error)}: convert them to float32") from None
    old = re.compile(rf"(?<=\.)({'|'.join(_OLD_PARTS)})(?=\.(weight|bias)$)")
    return {old.sub(lambda match: _OLD_PARTS[match[0]], name): array for name, array in tensors.items()}


def _layout(config):
    """Returns {diffusers' name: (keys, shape)} of every parameter of the network."""
    levels, params = len(config.model.multipliers), flatten_dict(parts.abstract_state(config).params)
    return {_torch_name(keys, levels): (keys, leaf.shape) for keys, leaf in params.items()}


def _torch_name(keys, levels):
    """Returns diffusers' name of the parameter with these keys, in a network of this many levels."""
    module, *inner, leaf = keys
    if module not in _MODULES:
        side, level, kind, *index = module.split("_")
        level = int(level) if side == "down" else levels - 1 - int(level)
        kind = {"block": "resnets", "attn": "attentions"}.get(kind, f"{kind}rs")  # downsample: downsamplers
        module = f"{side}_blocks.{level}.{kind}.{index[0] if index else '0.conv'}"
    else:
        module = _MODULES[module]
    return ".".join([module, *(_PARTS.get(name, name) for name in inner), "bias" if leaf == "bias" else "weight"])


def _torch_shape(name, shape):
    """Returns the shape of a parameter in torch: kernels are [out, in, height, width], dense ones [out, in]."""
    if name == _CLASSES:
        return shape
    if len(shape) == 4:
        return tuple(shape[i] for i in (3, 2, 0, 1))
    return (*shape[::-1], *((1, 1) if name.endswith("conv_shortcut.weight") else ()))


def _to_torch(name, array):
    if name == _CLASSES:
        return array
    transposed = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.ascontiguousarray(transposed.reshape(_torch_shape(name, array.shape)))


def _to_flax(file, name, array, shape):
    """Returns the parameter of this shape; a dense kernel may be stored as a 1×1 convolution, or the reverse."""
    expected = _torch_shape(name, shape)
    is_dense = len(shape) == 2 and name != _CLASSES and array.shape in (expected[:2], (*expected[:2], 1, 1))
    if not (is_dense or array.shape == expected) or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{file} has {name} as {array.dtype} {array.shape}, not float32 {expected}")
    if name != _CLASSES:
        array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.reshape(expected[: len(shape)]).T
    with np.errstate(over="ignore"):  # float64 may overflow, which the next line reports
        array = np.array(array, np.float32, order="C")
    if not np.isfinite(array).all():
        raise UserError(f"{file} has {name} with values that are not finite: fetch it again, or give other weights")
    return array


# ---------------------------------------------------------------- export


def export_diffusers(workdir: epath.PathLike, out: str, step: int | None = None, ema: float | None = None) -> None:
    """Writes the averaged parameters of the last checkpoint, or `step`, for diffusers' `DDPMPipeline.from_pretrained`.

    The pipeline runs the ancestral chain with the run's sigma, whatever the run's sampling.sampler. Schedules
    other than Ho's are written as `trained_betas`. A run with classes has num_classes + 1 class embeddings, the last
    of ∅; DDPMPipeline itself passes no classes.

    The folder appears whole or not at all. Of several processes the first writes it.

    Raises:
      UserError: there is no run or no checkpoint, sampling.sigma is zero, diffusers has no such network, or `out`
        is not a new folder.
    """
    config, folder = read_config(workdir), epath.Path(out).expanduser()
    _unet_config(config)  # raises before anything is written
    configs = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        f"scheduler/{_SCHEDULER}": _scheduler_config(config),
    }
    hosts.on_main(lambda: _check_folder(folder, out))
    step, params = ema_params(parts.build(config), workdir, step, ema)
    card = model_card(config, workdir, step, out, "diffusers", ema)

    def write():
        try:
            with files.new_folder(folder) as partial:
                write_unet(config, params, partial / "unet")
                for name, content in configs.items():
                    _write_json(partial / name, content)
                files.write_text(partial / "README.md", card)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another folder") from None
        print(f"diffusers model of step {step}: {out}; complete its model card, README.md")
        if num_classes := config.model.num_classes:
            print(
                f"num_class_embeds={num_classes + 1}: {num_classes} classes and, last, no class, which guidance needs; "
                "DDPMPipeline passes no classes: call its unet(x, t, class_labels)"
            )
        elif (num_steps := config.schedule.num_steps) != 1000:
            print(f"DDPMPipeline takes 1000 steps by default: call it with num_inference_steps={num_steps}")

    hosts.on_main(write)


def _check_folder(folder, out):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={out} already exists: give a new folder")
    files.check_writable(folder, f"--out={out}")


def write_unet(config: ConfigDict, params: dict, folder: epath.Path) -> None:
    """Writes the config and the weights of diffusers' UNet2DModel.

    Raises:
      UserError: diffusers has no such network.
    """
    unet_config, flat = _unet_config(config), flatten_dict(params)
    tensors = {name: _to_torch(name, flat[keys]) for name, (keys, _) in _layout(config).items()}
    with files.replacing(folder / _WEIGHTS) as file:
        file.write(safetensors.save(tensors, {"format": "pt"}))
    _write_json(folder / "config.json", unet_config)


def _write_json(file, content):
    files.write_text(file, json.dumps(content, indent=2) + "\n")


def _unet_config(config):
    """Returns the config.json of the UNet2DModel that equals the run's network."""
    size, model = configs.image_size(config), config.model
    if len(size) != 2:
        raise UserError(f"config.data.image_size={size} is not of images, as diffusers' are: leave --format out")
    height, width = size
    if model.multipliers[0] != 1:
        raise UserError(f"config.model.multipliers={model.multipliers} must begin with 1 to be a network of diffusers")
    if not model.num_res_blocks and {*model.multipliers} != {1}:
        raise UserError(
            f"config.model.num_res_blocks=0 needs multipliers of 1 for a network of diffusers, not {model.multipliers}"
        )
    has_attention = [height >> level in model.attention_resolutions for level in range(len(model.multipliers))]
    return {
        "_class_name": "UNet2DModel",
        **{key: allowed[0] for key, (_, allowed) in _FIXED.items()},
        "sample_size": height if height == width else [height, width],
        "in_channels": config.data.channels,
        "out_channels": config.data.channels * (2 if model.learned_sigma else 1),
        "block_out_channels": [model.channels * n for n in model.multipliers],
        "down_block_types": ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in has_attention],
        "up_block_types": ["AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(has_attention)],
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "attention_head_dim": None,
        "norm_num_groups": _num_groups(config),
        "num_class_embeds": model.num_classes + 1 if model.num_classes else None,
        **({"_num_classes": model.num_classes} if model.num_classes else {}),
    }


def _num_groups(config):
    """Returns the number of groups of all normalisations; `unet.GroupNorm` may use fewer than model.num_groups."""
    scales = [shape for keys, shape in _layout(config).values() if keys[-1] == "scale"]
    groups = {math.gcd(config.model.num_groups, channels) for (channels,) in scales}
    if len(groups) > 1:
        raise UserError(
            f"config.model.num_groups={config.model.num_groups} makes {sorted(groups)} groups in this network, but "
            "diffusers has one number for all: only networks whose channels it divides can be exported"
        )
    return groups.pop()


def _scheduler_config(config):
    """Returns the config of the DDPMScheduler whose steps are those of the run."""
    variances = {sigma: variance for variance, sigma in _SIGMAS.items()}
    if config.sampling.sigma not in variances:
        raise UserError(
            f"config.sampling.sigma={config.sampling.sigma!r} is not in diffusers' DDPMScheduler: change it in the "
            f"run's config.json to one of {', '.join(variances)}"
        )
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    name, num_steps, shift, zero_terminal = (
        config.schedule[key] for key in ("name", "num_steps", "log_snr_shift", "zero_terminal")
    )
    return {
        "_class_name": "DDPMScheduler",
        **_DDPM,
        "num_train_timesteps": num_steps,
        "trained_betas": None if name == "ho_linear" and not shift else _beta_squared(name, num_steps, shift).tolist(),
        "rescale_betas_zero_snr": zero_terminal,
        "variance_type": variances[config.sampling.sigma],
        "clip_sample": config.sampling.clip,
        "prediction_type": predictions[config.model.prediction],
    }
