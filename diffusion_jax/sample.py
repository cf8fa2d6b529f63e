"""Samples from a workdir: for a notebook (`load`, `load_network`) and for the command line (`write_samples`)."""

import itertools
import json
import re
import zlib
from collections.abc import Callable

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion_jax import parts, sampling
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.parts import Parts
from diffusion_jax.pictures import grids
from diffusion_jax.running import checkpoint, files
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.schedule import Schedule

SHARD = 1024  # images of one file


# ---------------------------------------------------------------- for a notebook


def load(
    workdir: epath.PathLike,
    num: int | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool | None = None,
    dtype: str | None = None,
    progress: bool = False,
) -> tuple[Callable, dict]:
    """Loads the sampler and the parameters of the last checkpoint, for a notebook.

        sample_fn, params = diffusion_jax.load("runs/digits", sampler="ddim", steps=50)
        x = sample_fn(params, jax.random.key(0))  # float32 [num, H, W, C] in about [-1, 1]
        more = sample_fn(params, jax.random.key(0), num)  # images num .. 2 num - 1 of the same key

    The first call compiles. All steps are one XLA program, on all devices of this process.

    Args (None: the value of the run's config):
      workdir: the workdir of a training run.
      num: images per call. Image i depends on (params, rng, i) alone, so it is the same for any num.
      sampler: "ancestral", Ho et al.'s chain with the config's sigma over all T steps; "ddim";
        or "dpmpp_2m", best for few steps (10 to 20).
      steps: steps of ddim and dpmpp_2m, 1..T; 0 means T.
      eta: noise of ddim: from 0 (none; the same latent gives nearly the same image for any number of
        steps) to 1 (as much as the ancestral sampler's posterior).
      clip: True bounds the predicted x_0 to [-1, 1] inside the chain.
      dtype: dtype of the network's computation, "float32" or "bfloat16".
      progress: True shows a bar of the steps with speed and time left; the images stay the same.

    Returns:
      (sample_fn, params): see `sampling.make_sample_fn`; params are the averaged (EMA) parameters,
      float32 NumPy arrays.

    Raises:
      UserError: `workdir` holds no run or no checkpoint, or a value cannot be used.
    """
    config = with_sampling(workdirs.read_config(workdir), sampler, steps, eta, clip, dtype, num)
    run = parts.build(config)
    window = _progress(run.num_sampling_steps, run.num_samples) if progress else None
    return run.sample_fn(window=window), ema_params(run, workdir)[1]


def load_network(workdir: epath.PathLike) -> tuple[Callable, dict, Schedule]:
    """Loads the network of the last checkpoint, for a sampler of your own.

    Returns:
      (apply_fn, params, s): apply_fn({"params": params}, x [B, H, W, C], t [B] in 1..T) is the predicted
      noise ε̄ [B, H, W, C]; params are those of `load`; s is the Schedule.

    Raises:
      UserError: `workdir` holds no run or no checkpoint.
    """
    run = parts.build(workdirs.read_config(workdir))
    return run.network, ema_params(run, workdir)[1], run.schedule


def _progress(steps, num):
    """Returns a window that draws a bar from inside the program; each call of the sampler restarts it."""
    every = max(1, steps // 100)
    reports = steps // every * len(jax.local_devices()[:num])  # each device reports
    bar = tqdm.tqdm(total=reports, desc="sampling", bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}")

    calls = itertools.count()  # the devices report from threads of their own

    def report(_):
        done = next(calls) % reports + 1
        if done == 1:
            bar.reset()
        bar.n = done
        bar.update(0)
        if done == reports:
            bar.refresh()

    return sampling.Window(report, every)


# ---------------------------------------------------------------- for the command line


def write_samples(workdir: epath.PathLike, num: int, seed: int, out: str, **settings) -> None:
    """Writes `num` images: a grid if `out` ends in .png, uint8 [num, H, W, C] if in .npz, shards if in "/".

    An .npz has the images as "arr_0", the name that evaluation suites read, and as "about" the JSON of what
    made them. Shards are .npz files of SHARD images, named by their first and last number, with samples.json
    beside them; a shard that exists is not made again. Image i is the same for any `num` and for any number
    of devices or processes, which share the work; process 0 writes.

    Args:
      settings: sampler, steps and eta of `load`.

    Raises:
      UserError: there is nothing to sample from, or `out` ends in something else or holds other samples.
    """
    if not (out.endswith((".png", ".npz", "/"))):
        raise UserError(f"--out={out} must end in .png (a grid), .npz (an array) or / (a folder of arrays)")
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    config = with_sampling(workdirs.read_config(workdir), **settings)
    run = parts.build(config)
    per_call = -(-min(num, run.num_samples) // jax.process_count())
    sample_fn, (step, params) = run.sample_fn(per_call), ema_params(run, workdir)
    about = _about(config, workdir, step, params, seed)
    params = jax.device_put(params)
    with tqdm.tqdm(total=num, unit="image", desc="sampling", disable=jax.process_index() != 0) as bar:

        def make(first, num):
            return _share(sample_fn, params, seed, first, num, per_call, bar)

        if out.endswith("/"):
            _write_shards(epath.Path(out), num, make, bar, about)
        elif out.endswith(".png"):
            samples = make(0, num)
            if jax.process_index() == 0:
                grids.save_png(out, grids.grid(samples))
        else:
            _save_npz(epath.Path(out), make(0, num), about=np.array(json.dumps({**about, "first": 0, "num": num})))
    if jax.process_index() == 0:
        print(f"{num} samples: {out}")


def _about(config, workdir, step, params, seed):
    """Returns everything that samples depend on; other samples differ in it. Unused settings are None."""
    every = json.dumps(checkpoint.checksums(params), sort_keys=True)
    sampler, num_steps = config.sampling.sampler, config.schedule.num_steps
    return {
        "workdir": str(workdir),
        "step": step,
        "checksum": f"{zlib.crc32(every.encode()):08x}",
        "seed": seed,
        "sampler": sampler,
        "steps": parts.num_sampling_steps(config),
        "schedule": f"{config.schedule.name}, T = {num_steps}",
        "eta": float(config.sampling.eta) if sampler == "ddim" else None,
        "sigma": config.sampling.sigma if sampler == "ancestral" else None,
        "clip": config.sampling.clip,
        "dtype": config.model.dtype,
    }


def _share(sample_fn, params, seed, first, num, per_call, bar):
    """Returns images first .. first + num - 1, uint8, in every process; each makes its share of every round."""
    processes, made = jax.process_count(), []
    for done in range(0, num, per_call * processes):
        own = first + done + per_call * jax.process_index()
        x = pixels.to_uint8(sample_fn(params, jax.random.key(seed), own))
        made.append(multihost_utils.process_allgather(x, tiled=True) if processes > 1 else x)
        bar.update(min(per_call * processes, num - done))
    return np.concatenate(made)[:num]


def _write_shards(folder, num, make, bar, about):
    """Writes the shards that are missing, of `num` images in all."""
    manifest = folder / "samples.json"
    text = json.dumps(about, indent=2) + "\n"
    if manifest.exists() and manifest.read_text() != text:
        raise UserError(
            f"--out={folder}/ holds samples of another run, checkpoint, seed or sampler (samples.json): give another "
            "folder"
        )
    present = _shards(folder)
    most = max((stop for _, stop in present), default=0)
    if most > num:
        raise UserError(f"--num={num} is less than the {most} images that --out={folder}/ holds: give another folder")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("shards")  # every process lists the folder before process 0 writes
    if jax.process_index() == 0:
        files.write_text(manifest, text)
    for first in range(0, num, SHARD):
        stop = min(first + SHARD, num)
        done = (first, stop) in present
        if jax.process_count() > 1:  # all follow process 0
            done = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
        if done:
            bar.update(stop - first)
        else:
            _save_npz(_shard(folder, first, stop), make(first, stop - first))
        if jax.process_index() == 0:  # an earlier, smaller --num left a shorter shard
            for shorter in [other for other in present if other[0] == first and other[1] < stop]:
                _shard(folder, *shorter).unlink()


def _shard(folder, first, stop):
    return folder / f"{first:08d}-{stop - 1:08d}.npz"


def _shards(folder):
    """Returns [(first, stop)] of the images that the folder holds."""
    names = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.iterdir()] if folder.exists() else []
    return [(int(name[1]), int(name[2]) + 1) for name in names if name]


def _save_npz(path, samples, **more):
    if jax.process_index() == 0:
        with files.replacing(path) as file:
            np.savez(file, samples, **more)


# ---------------------------------------------------------------- what samplers need of a workdir


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
      UserError: a value cannot be used, or eta is given to another sampler than ddim.
    """
    values = {"sampler": sampler, "steps": steps, "eta": eta, "clip": clip, "num": num}
    flat = {f"sampling.{key}": value for key, value in values.items() if value is not None}
    flat |= {} if dtype is None else {"model.dtype": dtype}
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({key: _as_python(value) for key, value in flat.items()})
    configs.check(config)
    if eta is not None and config.sampling.sampler != "ddim":
        raise UserError(
            f"eta={eta} is ddim's, and the sampler is {config.sampling.sampler}: leave it out, or choose ddim"
        )
    return config


def _as_python(value):
    """Returns NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def read_images(config: ConfigDict, workdir: epath.PathLike, split: str | None = None):
    """Opens the data set of a run.

    Args:
      split: in place of data.split.

    Raises:
      UserError: the data set cannot be opened; the message says where to correct its place.
    """
    file = workdirs.absolute(workdir) / "config.json"
    if not configs.has_images(config):
        raise UserError(f"{file} names no images (data.path is empty, the run was imported): write data.path there")
    try:
        return parts.images(config, split)
    except UserError as error:
        raise UserError(f"{error} (data.* of this run are in {file})") from None


def ema_params(run: Parts, workdir: epath.PathLike) -> tuple[int, dict]:
    """Returns (step, averaged parameters) of the last checkpoint.

    Raises:
      UserError: there is no checkpoint, or none can be read.
    """
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        state = checkpoint.restore(manager, run.abstract_state())
    if state is None:
        raise UserError(f"--workdir={workdir} holds no checkpoint yet: train first")
    return int(state.step), state.ema_params
