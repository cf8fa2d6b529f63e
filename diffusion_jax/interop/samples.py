"""Samples as files: a grid, an array, or a folder of shards, which can be resumed."""

import json
import re
import zlib
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax import parts
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import grids
from diffusion_jax.running import checkpoint, files
from diffusion_jax.running.config import check_integer, check_seed, with_sampling
from diffusion_jax.running.workdir import read_config
from diffusion_jax.sample import ema_params

SHARD = 1024  # images of one file


def write_samples(workdir: epath.PathLike, num: int, seed: int, out: str, **settings: Any) -> None:
    """Writes `num` images: a grid if `out` ends in .png, uint8 [num, H, W, C] if in .npz, shards if in "/".

    An .npz stores the images as "arr_0", the name that evaluation suites read, and their settings as JSON in
    "about". Shards are .npz files of SHARD images, named by their first and last index, with samples.json
    beside them; an existing shard is skipped. Image i is the same for any `num` and any number of devices or
    processes, which share the work; process 0 writes.

    Args:
      settings: sampler, steps and eta of `load`.

    Raises:
      UserError: there is no checkpoint, or `out` has another ending or contains other samples.
    """
    if not (out.endswith((".png", ".npz", "/"))):
        raise UserError(f"--out={out} must end in .png (a grid), .npz (an array) or / (a folder of arrays)")
    check_integer("--num", num, 1, 2**32)
    check_seed(seed)
    config = with_sampling(read_config(workdir), **settings)
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
    """Returns everything that samples depend on, as a dict for JSON. Unused settings are None."""
    checksums = json.dumps(checkpoint.checksums(params), sort_keys=True)
    sampler, num_steps = config.sampling.sampler, config.schedule.num_steps
    return {
        "workdir": str(workdir),
        "step": step,
        "checksum": f"{zlib.crc32(checksums.encode()):08x}",
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
    """Returns images first .. first + num - 1, uint8, in every process; the processes divide each round of calls."""
    processes, made = jax.process_count(), []
    for done in range(0, num, per_call * processes):
        own = first + done + per_call * jax.process_index()
        x = pixels.to_uint8(sample_fn(params, jax.random.key(seed), own))
        made.append(multihost_utils.process_allgather(x, tiled=True) if processes > 1 else x)
        bar.update(min(per_call * processes, num - done))
    return np.concatenate(made)[:num]


def _write_shards(folder, num, make, bar, about):
    """Writes the missing shards of `num` images."""
    manifest = folder / "samples.json"
    text = json.dumps(about, indent=2) + "\n"
    if manifest.exists() and not _same_origin(manifest, about):
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
        if jax.process_count() > 1:  # all processes follow process 0
            done = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
        if done:
            bar.update(stop - first)
        else:
            _save_npz(_shard(folder, first, stop), make(first, stop - first))
        if jax.process_index() == 0:  # an earlier, smaller --num left a shorter shard
            for shorter in [other for other in present if other[0] == first and other[1] < stop]:
                _shard(folder, *shorter).unlink()


def _same_origin(manifest, about):
    """True if samples.json agrees with `about`, wherever the workdir is: "runs/x" and "runs/x/" are one."""
    try:
        there = json.loads(manifest.read_text())
    except ValueError:
        return False
    return isinstance(there, dict) and there | {"workdir": about["workdir"]} == about


def _shard(folder, first, stop):
    return folder / f"{first:08d}-{stop - 1:08d}.npz"


def _shards(folder):
    """Returns (first, stop) of each shard in the folder."""
    names = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.iterdir()] if folder.exists() else []
    return [(int(name[1]), int(name[2]) + 1) for name in names if name]


def _save_npz(path, samples, **more):
    if jax.process_index() == 0:
        with files.replacing(path) as file:
            np.savez(file, samples, **more)
