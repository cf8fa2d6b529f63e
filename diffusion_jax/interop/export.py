"""The sampler as one file that needs only JAX and NumPy: `export` writes it, `load_exported` reads it.

The file is an .npz with these arrays:

    program       uint8, the serialised `jax.export` artifact: (params, key_data, indices) -> images
    params/...    the parameters, one array for each leaf, under its path
    about         JSON of the run's config, step, platforms and version of JAX
    checksum      SHA-256 of these arrays
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.running import files
from diffusion_jax.running.config import with_sampling
from diffusion_jax.running.workdir import read_config
from diffusion_jax.sample import ema_params
from diffusion_jax.sampling import image_numbers

PLATFORMS = ("cpu", "cuda", "tpu")


def export_sampler(workdir: epath.PathLike, out: str, **settings: Any) -> None:
    """Writes the sampler of the last checkpoint as one file, see `export`.

    Args:
      settings: sampler, steps and eta of `diffusion_jax.load`.

    Raises:
      UserError: see `diffusion_jax.load` and `export`.
    """
    config = with_sampling(read_config(workdir), **settings)
    run = parts.build(config)
    step, params = ema_params(run, workdir)
    export(config.to_dict(), params, step, run.indexed_sample_fn(), out)
    if jax.process_index() == 0:
        print(f"sampler of step {step}, {epath.Path(out).stat().length / 1e6:.1f} MB: {out}")


def export(config: dict, params: dict, step: int, sample: Callable, out: str) -> None:
    """Writes a sampler as one file.

    Args:
      config: the run's config, stored as documentation.
      params: nested dicts of arrays.
      sample: (params, rng, indices [n]) -> float32 [n, H, W, C] for any n, see `sampling.make_indexed_sample_fn`.
      out: an .npz file.

    Raises:
      UserError: `out` does not end in .npz, or cannot be written.
    """
    if not out.endswith(".npz"):
        raise UserError(f"--out={out} must end in .npz: give another name")
    flat = {f"params/{path}": np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}

    def program(params, key_data, indices):
        return sample(params, jax.random.wrap_key_data(key_data), indices)

    (num,) = jax.export.symbolic_shape("num")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    key_data, indices = jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct((num,), np.int32)
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, key_data, indices)

    about = {"config": config, "step": int(step), "platforms": PLATFORMS, "jax": jax.__version__}
    arrays = {"program": np.frombuffer(exported.serialize(), np.uint8), "about": np.array(json.dumps(about)), **flat}
    try:
        with files.replacing(out) as file:
            # To mypy, any array might be called allow_pickle.
            np.savez(file, checksum=np.array(_checksum(arrays)), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error}): give another file") from None


def load_exported(path: epath.PathLike) -> tuple[Callable, dict]:
    """Loads the sampler of a file that `--mode=export` wrote.

        sample_fn, params = diffusion_jax.load_exported("sampler.npz")
        x = sample_fn(params, jax.random.key(0), 16)  # float32 [16, H, W, C]

    Returns:
      (sample_fn, params): sample_fn(params, rng, num, first=0) returns images first .. first + num - 1. Image i
      depends on (params, rng, i) alone and equals that of the run's own sampler.

    Raises:
      UserError: the file does not exist, is damaged, or was written by a version of JAX that this one cannot read.
    """
    arrays = _read(epath.Path(path))
    about = json.loads(str(arrays["about"]))
    try:
        exported = jax.export.deserialize(bytearray(arrays["program"].tobytes()))
        exported.mlir_module()  # raises for a newer StableHLO, which would otherwise fail at the first call
        call = jax.jit(exported.call)
    except Exception as error:  # flatbuffers and MLIR raise types of their own
        reason = one_line(error, 200)
        raise UserError(
            f"{path} was written by jax {about['jax']}, and jax {jax.__version__} cannot read it ({reason}): use "
            "that version, or export again with this one"
        ) from None
    flat = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    params = unflatten_dict(flat, sep="/")

    def sample_fn(params, rng, num, first=0):
        return call(params, jax.random.key_data(rng), image_numbers(first, num).view(np.int32))

    return sample_fn, params


def _read(path):
    if not path.exists():
        raise UserError(f"{path} does not exist: give a file that --mode=export wrote")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        stored = str(arrays.pop("checksum"))
    except Exception as error:  # zipfile, zlib and NumPy raise types of their own
        raise UserError(f"{path} is not an exported sampler, or is damaged ({error}): export it again") from None
    if stored != _checksum(arrays):
        raise UserError(f"{path} is damaged (its checksum is wrong): export it again")
    return arrays


def _checksum(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + str((arrays[name].dtype, arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
