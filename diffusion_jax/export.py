"""The sampler as one file, which JAX and NumPy alone can open: `export` writes it, `load_exported` reads it.

An .npz with these arrays:

    program       uint8, the serialised `jax.export` artifact: (params, key_data, indices) -> images
    params/...    the parameters, one array for each leaf, under its path
    about         JSON: the run's config, step, platforms, versions
    checksum      SHA-256 of all of these
"""

import hashlib
import io
import json

import jax
import jax.export
import numpy as np
from etils import epath

from diffusion_jax.errors import UserError, one_line

PLATFORMS = ("cpu", "cuda", "tpu")


def export(config, params, step: int, sample, out: str) -> None:
    """Writes the sampler of a run.

    Args:
      config: the run's config as a dict, kept in the file for whoever reads it.
      params: nested dicts of arrays.
      sample: (params, rng, indices [n]) -> float32 [n, H, W, C], of any n: `sampling.make_indexed_sample_fn`.
      out: where; ends in .npz.

    Raises:
      UserError: `out` ends in something else, or cannot be written.
    """
    if not out.endswith(".npz"):
        raise UserError(f"--out={out} must end in .npz")
    flat = {f"params/{'/'.join(path)}": np.asarray(leaf) for path, leaf in _flatten(params)}

    def program(params, key_data, indices):
        return sample(params, jax.random.wrap_key_data(key_data), indices)

    (num,) = jax.export.symbolic_shape("num")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    key_data, indices = jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct((num,), np.int32)
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, key_data, indices)

    about = {"config": config, "step": int(step), "platforms": PLATFORMS, "jax": jax.__version__}
    arrays = {"program": np.frombuffer(exported.serialize(), np.uint8), "about": np.array(json.dumps(about)), **flat}
    content = io.BytesIO()
    np.savez(content, checksum=np.array(_checksum(arrays)), **arrays)
    path = epath.Path(out)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getvalue())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error}): give another file") from None


def load_exported(path):
    """The sampler of a file that `--mode=export` has written; needs JAX, NumPy and flatbuffers.

        sample_fn, params = diffusion_jax.load_exported("sampler.npz")
        x = sample_fn(params, jax.random.key(0), 16)  # float32 [16, H, W, C]

    Returns:
      (sample_fn, params): sample_fn(params, rng, num, first=0) makes images first .. first + num - 1;
      image i depends on (params, rng, i) alone, and is that of the run's own sampler.

    Raises:
      UserError: no such file, not whole, or of a version of JAX that this one cannot read.
    """
    arrays = _read(epath.Path(path))
    about = json.loads(str(arrays["about"]))
    try:
        exported = jax.export.deserialize(bytearray(arrays["program"].tobytes()))
        exported.mlir_module()  # a newer StableHLO would fail only when it is called
        call = jax.jit(exported.call)
    except Exception as error:  # flatbuffers' and MLIR's own
        reason = one_line(error, 200)
        raise UserError(
            f"{path} was written by jax {about['jax']}, and jax {jax.__version__} cannot read it ({reason}): use "
            "that version, or export again with this one"
        ) from None
    params = {}
    for name in arrays:
        if name.startswith("params/"):
            *folders, leaf = name.split("/")[1:]
            place = params
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = arrays[name]

    def sample_fn(params, rng, num, first=0):
        return call(params, jax.random.key_data(rng), np.arange(first, first + num, dtype=np.int32))

    return sample_fn, params


def _read(path):
    if not path.exists():
        raise UserError(f"{path} does not exist: give a file that --mode=export has written")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        stored = str(arrays.pop("checksum"))
    except Exception as error:  # zipfile's, zlib's, NumPy's
        raise UserError(f"{path} is no exported sampler, or is damaged ({error}): export it again") from None
    if stored != _checksum(arrays):
        raise UserError(f"{path} is damaged (its checksum is wrong): export it again")
    return arrays


def _checksum(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + str((arrays[name].dtype, arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _flatten(tree, path=()):
    """(path, leaf) of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value
