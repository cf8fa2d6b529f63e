"""Samples as files: a grid, an array, or a folder of shards, which can be resumed."""

import functools
import json
import re
import zlib
from collections.abc import Sequence
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
from diffusion_jax.running import checkpoint, files, hosts, measured, watch
from diffusion_jax.running.config import check_integer, check_seed, choose, has_alpha, with_sampling
from diffusion_jax.running.workdir import absolute, read_config
from diffusion_jax.sample import ema_params

SHARD = 1024  # images of one file


def write_samples(
    workdir: epath.PathLike,
    num: int,
    seed: int,
    out: str,
    labels: Sequence[str | int] = (),
    step: int | None = None,
    ema: float | None = None,
    **settings: Any,
) -> None:
    """Writes `num` images: a grid if `out` ends in .png, an array [num, H, W, C] if in .npz, shards if in "/".

    Signals and volumes have other axes, and a grid shows them as `grids.tiles` says.

    The array is uint8, or in data.range where the run has one: data.dtype, the type of the array that was trained on.

    An .npz stores the images as "arr_0", the name that evaluation suites read, and their settings as JSON in
    "about". Shards are such files of SHARD images, named by their first and last index, with samples.json
    beside them; an existing shard is skipped, a damaged one made again. Image i is the same for any `num` and any
    number of devices or processes, which share the work; process 0 writes.

    Args:
      labels: the classes to draw, by name or number: image i has class labels[i mod len(labels)]; () for all. The .npz
        has the class of each image as "labels", and the grid a row for each class.
      step, ema: see `diffusion_jax.load`.
      settings: sampler, steps, eta, guidance, sigma and grid of `load`.

    Raises:
      UserError: there is no checkpoint, `num`, `seed` or a label is out of range, or `out` has another ending, cannot
        be written or contains other samples.
    """
    path = epath.Path(out).expanduser()
    config = with_sampling(read_config(workdir), **settings)
    hosts.on_main(lambda: _check(num, seed, out, path))
    replaces = hosts.on_main(lambda: path.is_file())
    chosen, run = choose(config, labels), parts.build(config, measured.read(workdir, config, step, ema))
    per_call = -(-min(num, run.num_samples) // jax.process_count())
    step, params = ema_params(run, workdir, step, ema)
    shape, of_num = (per_call, *run.image_shape), functools.partial(run.sample_fn, per_call)
    sample_fn = watch.Sampler(of_num, shape, run.num_sampling_steps, params, flags="")
    about = _about(config, workdir, step, params, seed, chosen, ema)
    params = jax.device_put(params)
    finish = pixels.to_uint8
    if config.data.range and not out.endswith(".png"):
        low, high = config.data.range
        finish = functools.partial(pixels.to_range, low=low, high=high, dtype=config.data.dtype or "float32")
    one_call = num <= per_call * jax.process_count()  # which has a bar of its own
    with tqdm.tqdm(total=num, unit="image", desc="sampling", disable=one_call or jax.process_index() != 0) as bar:

        def make(first, num):
            return _share(sample_fn, params, seed, first, num, per_call, bar, chosen, finish)

        if out.endswith("/"):
            _write_shards(path, num, make, bar, about)
        elif out.endswith(".png"):
            samples = make(0, num)
            picture = grids.by_class(samples, config.data.classes, _labels(chosen, 0, num), has_alpha(config))
            hosts.on_main(lambda: grids.save_png(path, picture))
        else:
            _save_npz(path, make(0, num), 0, about)
    if jax.process_index() == 0:
        shown = grids.drawn_as(len(run.image_shape) - 1) if out.endswith(".png") else ""
        print(f"{num} samples{shown}: {out}{', in place of the file that was there' * replaces}")


def _check(num, seed, out, path):
    """Raises UserError for a number, a seed or an output that cannot be used."""
    if not out.endswith((".png", ".npz", "/")):
        raise UserError(f"--out={out} must end in .png (a grid), .npz (an array) or / (a folder of arrays)")
    check_integer("--num", num, 1, 2**32)
    check_seed(seed)
    if path.exists() and path.is_dir() != out.endswith("/"):
        raise UserError(f"--out={out} is a {'folder' if path.is_dir() else 'file'}: give another name")
    files.check_writable(path / "samples.json" if out.endswith("/") else path, f"--out={out}")


def _labels(chosen, first, num):
    """Returns the class of images first .. first + num − 1; None without classes."""
    return None if chosen is None else np.array(chosen, np.int32)[np.arange(first, first + num) % len(chosen)]


def _about(config, workdir, step, params, seed, chosen, ema):
    """Returns everything that samples depend on, as a dict for JSON. Unused settings are None."""
    checksums = json.dumps(checkpoint.checksums(params), sort_keys=True)
    sampler, num_steps = config.sampling.sampler, config.schedule.num_steps
    of_classes = {
        "classes": list(chosen or ()),
        "guidance": float(config.sampling.guidance),
        "guidance_interval": list(config.sampling.guidance_interval),
    }
    return {
        "workdir": absolute(workdir).name,  # samples travel: the folders above it belong to this machine
        "step": step,
        "checksum": f"{zlib.crc32(checksums.encode()):08x}",
        "seed": int(seed),
        "sampler": sampler,
        "steps": parts.num_sampling_steps(config),
        "schedule": f"{config.schedule.name}, T = {num_steps}",
        "eta": _eta(config.sampling),
        "sigma": config.sampling.sigma if sampler == "ancestral" or config.sampling.sigma == "analytic" else None,
        **({"grid": config.sampling.grid} if config.sampling.grid != "default" else {}),
        "clip": config.sampling.clip,
        "dtype": config.model.dtype,
        **({"range": list(config.data.range)} if config.data.range else {}),
        **({"data_dtype": config.data.dtype} if config.data.range and "int" in config.data.dtype else {}),
        **({} if chosen is None else of_classes),
        **({} if ema is None else {"ema": float(ema)}),
    }


def _eta(sampling):
    """Returns the eta of ddim and dpmpp_2m; that of dpmpp_2m is None where it is 0, as in earlier versions."""
    is_used = sampling.sampler == "ddim" or (sampling.sampler == "dpmpp_2m" and sampling.eta > 0)
    return float(sampling.eta) if is_used else None


def _share(sample_fn, params, seed, first, num, per_call, bar, chosen, finish):
    """Returns images first .. first + num - 1, finished, in every process; the processes divide each round of calls."""
    processes, made = jax.process_count(), []
    for done in range(0, num, per_call * processes):
        own = first + done + per_call * jax.process_index()
        x = finish(sample_fn(params, jax.random.key(seed), own, _labels(chosen, own, per_call)))
        made.append(multihost_utils.process_allgather(x, tiled=True) if processes > 1 else x)
        bar.update(min(per_call * processes, num - done))
    return np.concatenate(made)[:num]


def _write_shards(folder, num, make, bar, about):
    """Writes the missing and the damaged shards of `num` images."""
    ranges = [(first, min(first + SHARD, num)) for first in range(0, num, SHARD)]
    done = np.zeros(len(ranges), bool)

    def start():
        manifest = _read_manifest(folder)
        _check_origin(folder, about, manifest)
        _check_shards(folder, num)
        done[:] = [_is_whole(folder, first, stop, about, manifest) for first, stop in ranges]
        files.write_text(folder / "samples.json", json.dumps(about, indent=2) + "\n")

    hosts.on_main(start)
    if jax.process_count() > 1:  # all processes follow process 0
        done = np.asarray(multihost_utils.broadcast_one_to_all(done))
    present = _shards(folder)
    for (first, stop), is_done in zip(ranges, done, strict=True):
        if is_done:
            bar.update(stop - first)
        else:
            _save_npz(_shard(folder, first, stop), make(first, stop - first), first, about)
        if jax.process_index() == 0:  # an earlier, smaller --num left a shorter shard
            for shorter in [other for other in present if other[0] == first and other[1] < stop]:
                _shard(folder, *shorter).unlink()


def _check_shards(folder, num):
    """Raises UserError if the folder holds more than `num` images."""
    most = max((stop for _, stop in _shards(folder)), default=0)
    if most > num:
        raise UserError(f"--num={num} is less than the {most} images that --out={folder}/ holds: give another folder")


def _read_manifest(folder):
    """Returns the content of samples.json, or None if it is missing or damaged."""
    try:
        manifest = json.loads((folder / "samples.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _check_origin(folder, about, other):
    """Raises UserError if `other`, what an earlier command said of its samples, says that they are not the same."""
    if other is not None and any(about[key] != other.get(key) for key in about.keys() - {"workdir"}):
        raise UserError(
            f"--out={folder}/ holds samples of another run, checkpoint, seed or sampler (samples.json): give another "
            "folder"
        )


def _is_whole(folder, first, stop, about, manifest):
    """Returns True if the shard holds these images. A shard of an earlier version has its origin in the manifest."""
    try:
        with _shard(folder, first, stop).open("rb") as file, np.load(file, allow_pickle=False) as content:
            origin = json.loads(str(content["about"])) if "about" in content else manifest
            whole = content["arr_0"].shape[0] == stop - first  # reads all of it and checks its checksum
    except Exception:  # it is missing, cut or empty; zipfile and NumPy raise many types
        return False
    _check_origin(folder, about, {} if origin is None else origin)
    return whole


def _shard(folder, first, stop):
    return folder / f"{first:08d}-{stop - 1:08d}.npz"


def _shards(folder):
    """Returns (first, stop) of each shard in the folder."""
    names = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.iterdir()] if folder.exists() else []
    return [(int(name[1]), int(name[2]) + 1) for name in names if name]


def _save_npz(path, samples, first, about):
    """Writes samples from index `first` on, and what they depend on."""
    labels = _labels(about.get("classes"), first, len(samples))
    others = {"about": np.array(json.dumps({**about, "first": first, "num": len(samples)}))}
    others |= {} if labels is None else {"labels": labels}

    def save():
        with files.replacing(path) as file:
            np.savez(file, samples, **others)

    hosts.on_main(save)
