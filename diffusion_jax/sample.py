"""Samples from a workdir: for a notebook (`load`) and for the command line (`sample`)."""

import itertools
import json
import numbers
import re
import zlib

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax import from_config, sampling
from diffusion_jax.errors import UserError
from diffusion_jax.interop import export
from diffusion_jax.pictures import grids
from diffusion_jax.running import checkpoint
from diffusion_jax.state import abstract_state

SHARD = 1024  # images of one file


def load(
    workdir,
    num: int | None = None,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    clip: bool | None = None,
    dtype: str | None = None,
    progress: bool = False,
):
    """A sampler and the parameters of the last checkpoint, for a notebook:

        sample_fn, params = diffusion_jax.load("runs/digits", sampler="ddim", steps=50)
        x = sample_fn(params, jax.random.key(0))  # float32 [num, H, W, C] in about [-1, 1]
        more = sample_fn(params, jax.random.key(0), num)  # images num .. 2 num - 1 of the same key

    The first call compiles; all steps are one XLA program, on all devices of this process.

    Args (None: as the run's config has it):
      workdir: of a training run.
      num: images per call. Image i depends on (params, rng, i) alone, so it is the same for any.
      sampler: "ancestral", Ho et al.'s chain with the config's sigma over all T steps; "ddim";
        or "dpmpp_2m", best for few steps (10 to 20).
      steps: of ddim and dpmpp_2m, 1..T; 0 is T.
      eta: noise of ddim: 0 (none, the same latent gives the same image for any number of
        steps, nearly) to 1 (as much as the ancestral sampler's posterior).
      clip: bound the predicted x_0 to [-1, 1] inside the chain.
      dtype: of the network's computation, "float32" or "bfloat16".
      progress: show a bar of the steps with speed and time left; the images stay the same.

    Returns:
      (sample_fn, params): see `sampling.make_sample_fn`; params are the averaged (EMA)
      parameters, float32 NumPy arrays.

    Raises:
      UserError: no run, or no checkpoint, in `workdir`; a value that cannot be used.
    """
    num = _of_kind("num", num)
    if num is not None and num < 1:
        raise UserError(f"num={num} must be at least 1")
    config = _with(read_config(workdir), sampler, steps, eta, clip, dtype)
    window = _progress(config, num) if progress else None
    return from_config.sample_fn(config, num, window), ema_params(config, workdir)[1]


def _progress(config, num):
    """A window that draws a bar, from inside the program; the sampler's next call begins it anew."""
    steps = config.sampling.steps or config.schedule.num_steps
    every = max(1, steps // 100)
    reports = steps // every * len(jax.local_devices()[: num or config.sampling.num])  # each device reports
    bar = tqdm.tqdm(total=reports, desc="sampling", bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}")

    calls = itertools.count()  # the devices' threads report side by side

    def report(_):
        done = next(calls) % reports + 1
        if done == 1:
            bar.reset()
        bar.n = done
        bar.update(0)
        if done == reports:
            bar.refresh()

    return sampling.Window(report, every)


def load_network(workdir):
    """The network of the last checkpoint, for a sampler of your own.

    Returns:
      (apply_fn, params, s): apply_fn({"params": params}, x [B, H, W, C], t [B] in 1..T) is
      the predicted noise eps_bar [B, H, W, C]; params as of `load`; s is the Schedule.

    Raises:
      UserError: no run, or no checkpoint, in `workdir`.
    """
    config = read_config(workdir)
    return from_config.network(config), ema_params(config, workdir)[1], from_config.schedule(config)


def sample(workdir, num: int, seed: int, out: str, **how) -> None:
    """Writes `num` images: a grid if `out` ends in .png, uint8 [num, H, W, C] if in .npz, shards if in "/".

    An .npz has the images as "arr_0", as evaluation suites read it, and as "about" what made them, JSON. Shards
    are .npz files of SHARD images named by the first, with samples.json beside them; those that are there
    already are not made again. Image i is the same for any `num`, and any number of devices or processes,
    which share the work; process 0 writes.

    Args:
      how: sampler, steps and eta as of `load`.

    Raises:
      UserError: nothing to sample from, `out` ends in something else, or holds other samples.
    """
    if not (out.endswith((".png", ".npz", "/"))):
        raise UserError(f"--out={out} must end in .png (a grid), .npz (an array) or / (a folder of arrays)")
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    config = _with(read_config(workdir), **how)
    per_call = -(-min(num, config.sampling.num) // jax.process_count())
    sample_fn, (step, params) = from_config.sample_fn(config, per_call), ema_params(config, workdir)
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
    """What made samples, all that they depend on: other samples differ in it."""
    every = json.dumps(checkpoint.checksums(params), sort_keys=True)
    made = {"workdir": str(workdir), "step": step, "checksum": f"{zlib.crc32(every.encode()):08x}", "seed": seed}
    return made | from_config.describe_sampling(config)


def _share(sample_fn, params, seed, first, num, per_call, bar):
    """Images first .. first + num - 1, uint8, in every process; each makes its share of every round."""
    processes, made = jax.process_count(), []
    for done in range(0, num, per_call * processes):
        own = first + done + per_call * jax.process_index()
        x = grids.to_uint8(sample_fn(params, jax.random.key(seed), own))
        made.append(multihost_utils.process_allgather(x, tiled=True) if processes > 1 else x)
        bar.update(min(per_call * processes, num - done))
    return np.concatenate(made)[:num]


def _write_shards(folder, num, make, bar, about):
    """The shards that are missing, of `num` images in all."""
    manifest = folder / "samples.json"
    text = json.dumps(about, indent=2) + "\n"
    if manifest.exists() and manifest.read_text() != text:
        raise UserError(
            f"--out={folder}/ holds samples of another run, checkpoint, seed or sampler (samples.json): give another "
            "folder"
        )
    there = _shards(folder)
    most = max((stop for _, stop in there), default=0)
    if most > num:
        raise UserError(f"--num={num} is less than the {most} images that --out={folder}/ holds: give another folder")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("shards")  # all have looked before process 0 writes
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text)
    for first in range(0, num, SHARD):
        stop = min(first + SHARD, num)
        done = (first, stop) in there
        if jax.process_count() > 1:  # what process 0 sees is what all do
            done = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
        if done:
            bar.update(stop - first)
        else:
            _save_npz(_shard(folder, first, stop), make(first, stop - first))
        if jax.process_index() == 0:  # what an earlier, smaller --num has left of this one
            for shorter in [other for other in there if other[0] == first and other[1] < stop]:
                _shard(folder, *shorter).unlink()


def _shard(folder, first, stop):
    return folder / f"{first:08d}-{stop - 1:08d}.npz"


def _shards(folder):
    """[(first, stop)] of the images that are there already."""
    names = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.iterdir()] if folder.exists() else []
    return [(int(name[1]), int(name[2]) + 1) for name in names if name]


def _save_npz(path, samples, **more):
    """Process 0 writes beside and renames."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, samples, **more)
    partial.replace(path)


def export_sampler(workdir, out: str, **how) -> None:
    """Writes the sampler of the last checkpoint as one file, see `export.export`; `how` as of `load`.

    Raises:
      UserError: see `load` and `export.export`.
    """
    config = _with(read_config(workdir), **how)
    step, params = ema_params(config, workdir)
    export.export(config.to_dict(), params, step, from_config.sample(config), out)
    if jax.process_index() == 0:
        print(f"sampler of step {step}, {epath.Path(out).stat().length / 1e6:.1f} MB: {out}")


def _with(config, sampler=None, steps=None, eta=None, clip=None, dtype=None):
    """The config with what is given, not None, in place of its own."""
    config = config.copy_and_resolve_references()
    given = {"sampler": sampler, "steps": steps, "eta": eta, "clip": clip, "dtype": dtype}
    given = {key: _of_kind(key, value) for key, value in given.items() if value is not None}
    config.model.dtype = given.pop("dtype", config.model.dtype)
    config.sampling.update(given)
    from_config.check_sampling(config)
    if eta is not None and config.sampling.sampler != "ddim":
        raise UserError(
            f"eta={eta} is ddim's, and the sampler is {config.sampling.sampler}: leave it out, or choose ddim"
        )
    return config


_KINDS = {"num": int, "sampler": str, "steps": int, "eta": float, "clip": bool, "dtype": str}


def _of_kind(key, value):
    """The value of an argument, None or of its type, NumPy's numbers included. UserError if it is of another."""
    if value is None:
        return None
    kind = _KINDS[key]
    good = isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))
    if not good or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{key}={value!r} must be of type {kind.__name__}")
    return kind(value)


def read_config(workdir):
    """The config of a run. UserError if there is none."""
    config = checkpoint.read_config(workdir)
    if config is None:
        raise UserError(f"--workdir={workdir} holds no run (no config.json): give the workdir of a training run")
    return config


def read_images(config, workdir):
    """The data set of a run. UserError, with where to correct it, if that cannot be opened."""
    file = checkpoint.absolute(workdir) / "config.json"
    if not from_config.has_images(config):
        raise UserError(f"{file} names no images (data.path is empty, the run was imported): write data.path there")
    try:
        return from_config.images(config)
    except UserError as error:
        raise UserError(f"{error} (data.* of this run are in {file})") from None


def ema_params(config, workdir):
    """(step, averaged parameters) of the last checkpoint. UserError if there is none."""
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        state = checkpoint.restore(manager, abstract_state(config))
    if state is None:
        raise UserError(f"--workdir={workdir} holds no checkpoint yet: train first")
    return int(state.step), state.ema_params
