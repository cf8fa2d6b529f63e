"""The sampler as one file that needs only JAX and NumPy: `export` writes it, `load_exported` reads it.

The file is an .npz with these arrays:

    program       uint8, the serialised `jax.export` artifact: (params, key_data, indices) -> images
    params/...    the parameters, one array for each leaf, under its path
    about         JSON of the run's config, step, platforms and version of JAX
    checksum      SHA-256 of these arrays

It holds no path of the machine that wrote it. JAX promises to read a program for six months; `export_again` writes
it anew from the parameters and the config.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.interop.card import model_card
from diffusion_jax.running import config as configs
from diffusion_jax.running import files, hosts, measured
from diffusion_jax.running.watch import waiting
from diffusion_jax.running.workdir import read_config
from diffusion_jax.sample import ema_params
from diffusion_jax.sampling import class_labels, image_numbers

PLATFORMS = ("cpu", "cuda", "tpu")
_PROMISE = (
    "JAX promises that its versions of the six months after this one read the program. To write it again with a later "
    "version: diffusion_jax --mode=export --from=OLD.npz --out=NEW.npz"
)
_PATHS = ("path", "cache_dir", "manual_dir")  # keys of config.data


def write_sampler(
    workdir: str | None,
    source: str | None,
    out: str,
    format: str | None,
    step: int | None,
    ema: float | None,
    **settings: Any,
) -> None:
    """Writes the sampler of the run in `workdir`, or of the file `source`: one of them is None or "".

    Raises:
      UserError: see `export_sampler` and `export_again`.
    """
    if format not in (None, "jax"):
        raise UserError(f"--format={format} does not go with --mode=export: give jax or diffusers")
    if bool(source) == bool(workdir):
        raise UserError("--mode=export takes either --workdir=RUN or --from=SAMPLER.npz: give one of them")
    if workdir:
        export_sampler(workdir, out, step, ema, **settings)
    elif (step, ema) != (None, None):
        given = f"--ema={ema}" if step is None else f"--step={step}"
        raise UserError(f"{given} goes with --workdir=RUN: leave it out")
    else:
        export_again(source, out, **settings)


def export_sampler(
    workdir: epath.PathLike, out: str, step: int | None = None, ema: float | None = None, **settings: Any
) -> None:
    """Writes the sampler of the last checkpoint as one file, see `export`.

    Args:
      step, ema: see `diffusion_jax.load`.
      settings: sampler, steps and eta of `diffusion_jax.load`.

    Raises:
      UserError: see `diffusion_jax.load` and `export`.
    """
    own = configs.with_sampling(read_config(workdir), **settings)
    config = _portable(own.copy_and_resolve_references())
    hosts.on_main(lambda: _check_out(out))
    of_each_t = measured.read(workdir, config, step, ema)
    step, params = ema_params(parts.build(config, of_each_t), workdir, step, ema)
    card = model_card(own, workdir, step, out, "jax", ema)
    hosts.on_main(lambda: export(config, params, step, out, card, of_each_t))


def export_again(source: epath.PathLike, out: str, **settings: Any) -> None:
    """Writes an exported sampler again, with this version of JAX, from the file's own parameters and config.

    Args:
      source: a file that `export` wrote with any version of JAX.
      settings: sampler, steps and eta of `diffusion_jax.load`.

    Raises:
      UserError: the file is missing or damaged, its config is invalid or describes another network; see `export`.
    """
    arrays, about = _read(source)
    try:
        config = configs.complete(ConfigDict(about["config"]))
        config = _portable(configs.with_sampling(config, **settings))
        params = _params(arrays)
        shapes, expected = (jax.tree.map(np.shape, tree) for tree in (params, parts.abstract_state(config).params))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--from={source}: {one_line(error)}") from None
    if shapes != expected:
        raise UserError(f"--from={source} holds the parameters of another network than its config describes")
    of_each_t = parts.Measured(*map(np.array, about["measured"])) if about.get("measured") else None
    hosts.on_main(lambda: export(config, params, about["step"], out, about.get("card", ""), of_each_t))


def _portable(config):
    """Returns the config without paths, and with attention for all PLATFORMS; cuDNN's is one for GPUs alone."""
    config.data.update(dict.fromkeys(_PATHS, ""))
    config.model.attention = "xla"
    return config


def export(
    config: ConfigDict, params: dict, step: int, out: str, card: str = "", of_each_t: parts.Measured | None = None
) -> None:
    """Writes the sampler that a config describes as one file, and its model card beside it, as <out stem>-card.md.

    Args:
      config: a checked config; the file holds all of it.
      params: nested dicts of arrays.
      step: the step of the checkpoint.
      out: an .npz file.
      card: see `card.model_card`; the file holds it too. "": none.
      of_each_t: see `parts.build`; the file holds it too.

    Raises:
      UserError: `out` does not end in .npz, or cannot be written.
    """
    path = _check_out(out)
    about = {"config": config.to_dict(), "step": int(step), "platforms": PLATFORMS, "jax": jax.__version__}
    about |= {"compatibility": _PROMISE, "card": card}
    about |= {"measured": [array.tolist() for array in of_each_t]} if of_each_t else {}
    flat = {f"params/{name}": np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    program = np.frombuffer(
        waiting("translating the sampler for cpu, cuda, tpu", lambda: _program(config, params, of_each_t)), np.uint8
    )
    arrays = {"program": program, "about": np.array(json.dumps(about)), **flat}
    try:
        with files.replacing(path) as file:
            # To mypy, any array might be called allow_pickle.
            np.savez(file, checksum=np.array(_checksum(arrays)), **arrays)  # type: ignore[arg-type]
        if card:
            files.write_text(described := path.with_name(f"{path.stem}-card.md"), card)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({one_line(error)}): give another file") from None
    print(
        f"sampler of step {step}, {path.stat().length / 1e6:.1f} MB: {out}"
        + (f"; model card to complete: {described}" if card else "")
    )


def _check_out(out):
    """Returns the path of `out`, which must be writable."""
    if not out.endswith(".npz"):
        raise UserError(f"--out={out} must end in .npz: give another name")
    path = epath.Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"--out={out} is a folder: give another name")
    files.check_writable(path, f"--out={out}")
    return path


def _program(config, params, of_each_t):
    """Returns the serialised program of any number of images, for all PLATFORMS."""
    run = parts.build(config, of_each_t)

    def program(params, key_data, indices, *labels_and_weight):
        labels, weight = labels_and_weight or (None, 1.0)
        sample = dataclasses.replace(run, guided=parts.guided(config, weight)).indexed_sample_fn()
        return sample(params, jax.random.wrap_key_data(key_data), indices, labels=labels)

    (num,) = jax.export.symbolic_shape("num")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    key_data, indices = jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct((num,), np.int32)
    of_classes = (jax.ShapeDtypeStruct((num,), np.int32), jax.ShapeDtypeStruct((), np.float32))
    arguments = (shapes, key_data, indices, *(of_classes if run.num_classes else ()))
    with _no_source_locations(), jax.enable_x64(False):
        exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(*arguments)
    return exported.serialize()


@contextlib.contextmanager
def _no_source_locations() -> Iterator[None]:
    """Keeps the paths of source files out of programs; JAX names the file of each operation otherwise."""
    settings = {"jax_include_full_tracebacks_in_locations": True, "jax_traceback_in_locations_limit": 0}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def load_exported(path: epath.PathLike) -> tuple[Callable, dict]:
    """Loads the sampler of a file that `--mode=export` wrote.

        sample_fn, params = diffusion_jax.load_exported("sampler.npz")
        x = sample_fn(params, jax.random.key(0), num=16)  # float32 [16, H, W, C]

    Returns:
      (sample_fn, params): sample_fn(params, rng, num, first=0, labels=None, guidance=None) returns images first ..
      first + num - 1. Image i depends on (params, rng, i, its label) alone and equals that of the run's own sampler.
      Labels and guidance are for a run with classes, see `diffusion_jax.load`; None is the run's guidance.

    Raises:
      UserError: the file does not exist, is damaged, or was written by a version of JAX that this one cannot read.
      ValueError: by sample_fn, for images outside 0..2^32 − 1.
    """
    arrays, about = _read(path)
    try:
        exported = jax.export.deserialize(bytearray(arrays["program"].tobytes()))
        exported.mlir_module()  # raises for a newer StableHLO, which would otherwise fail at the first call
        call = jax.jit(exported.call)
    except Exception as error:  # flatbuffers and MLIR raise types of their own
        reason = one_line(error, 200)
        raise UserError(
            f"{path} was written by jax {about['jax']}, and jax {jax.__version__} cannot read it ({reason}): use "
            f"that version, or write it again with this one (diffusion_jax --mode=export --from={path} --out=NEW.npz)"
        ) from None

    model, settings = about["config"]["model"], about["config"]["sampling"]
    num_classes = model.get("num_classes", 0)

    def sample_fn(params, rng, num, first=0, labels=None, guidance=None):
        numbers = image_numbers(first, num)
        labels = class_labels(numbers, num_classes, labels)
        if labels is None and guidance is not None:
            raise ValueError(f"guidance={guidance} needs a sampler with classes, and this one has none")
        weight = np.float32(settings.get("guidance", 1.0) if guidance is None else guidance)
        of_classes = () if labels is None else (labels, weight)
        return call(params, jax.random.key_data(rng), numbers.view(np.int32), *of_classes)

    return sample_fn, _params(arrays)


def _params(arrays):
    flat = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    return unflatten_dict(flat, sep="/")


def _read(path):
    """Returns (arrays, about) of an exported file."""
    file = epath.Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{path} does not exist: give a file that --mode=export wrote")
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        stored, about = str(arrays.pop("checksum")), json.loads(str(arrays["about"]))
        wanted = {"config": dict, "step": int, "jax": str}
        if "program" not in arrays or any(type(about[key]) is not kind for key, kind in wanted.items()):
            raise ValueError("a part of it is missing")
    except Exception as error:  # zipfile, zlib and NumPy raise types of their own
        reason = one_line(error, 200)
        raise UserError(f"{path} is not an exported sampler, or is damaged ({reason}): export it again") from None
    if stored != _checksum(arrays):
        raise UserError(f"{path} is damaged (its checksum is wrong): export it again")
    return arrays, about


def _checksum(arrays):
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + str((arrays[name].dtype, arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
