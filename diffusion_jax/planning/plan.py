"""A plan of a run on absent TPUs: compiles its two programs ahead of time and estimates their needs."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion_jax import parts
from diffusion_jax.errors import UserError, one_line
from diffusion_jax.planning import programs
from diffusion_jax.planning.fit import does_not_fit
from diffusion_jax.planning.programs import CHIPS, DoesNotFit
from diffusion_jax.running import files
from diffusion_jax.running.config import check_batch
from diffusion_jax.running.tables import markdown_table
from diffusion_jax.step import AXIS, resident

SAMPLES = 50_000  # images in the FID of the literature
LARGEST = 4096  # images per chip and step at which the search ends
PATIENCE = 900  # seconds after which the search starts no compilation: large batches take many minutes each
COMPILED = epath.Path("~/.cache/diffusion_jax/plans")  # caches the needs of programs: a compilation may take minutes
_REPLICATED, _SPLIT = PartitionSpec(), PartitionSpec(AXIS)
_MEMORY = ("arguments", "outputs", "aliased", "temporaries", "code")

_EXAMPLES = "a TPU and its shape, e.g. v5e:2x4, v6e:16x16, v4:2x2x1 or v5p:2x2x2; cpu; or gpu"
_EXTRA = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device, as on a real TPU
# Keeps libtpu from asking a metadata server for this machine's TPU, and from locking out other processes.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def plan(config: ConfigDict, topology: str, out: epath.PathLike | None = None, search: bool = True) -> dict[str, Any]:
    """Compiles the train step and the sampling chain of a config for a topology, and prints their needs.

    Nothing runs and no array is allocated, so any Linux machine with the package libtpu will do. The programs
    are those of training and sampling, for config.train.batch_size images over all chips, and for
    config.sampling.num images rounded up to a multiple of the chips. Times are lower bounds, see
    `programs.roofline`. JAX uses no accelerator of this machine unless the topology is "gpu".

    Args:
      topology: chips of TPU v4, v5e, v5p or v6e and their shape, e.g. "v5e:2x4"; or "cpu" or "gpu" for the
        devices of this machine, which have no roofline.
      out: a JSON file for the result, or None.
      search: True also searches, after the table, for the largest power of two of images per chip that fits. Each
        doubling compiles the train step, until one fails or LARGEST or PATIENCE is reached.

    Returns:
      The printed numbers, in images, bytes, FLOPs and seconds; "per_chip" is for one step of training or of
      the chain. Unknown values are None.

    Raises:
      UserError: the topology or its compiler does not exist, the batch does not divide among the chips, or
        the config does not fit into their memory.
    """
    config = parts.with_classes(config)
    devices, chip = _devices(topology)
    num_chips = len(devices)
    check_batch(config, num_chips)
    batch, num = config.train.batch_size // num_chips, -(-config.sampling.num // num_chips)
    num_steps, num_calls = parts.num_sampling_steps(config), -(-SAMPLES // (num * num_chips))

    def measure_train(batch):
        lowered = lower_train_step(config, devices, batch)
        return _measure(topology, lowered, chip, num_chips, config.train.accumulate, 1)

    _print_progress(f"{topology}: compiling the train step …")
    try:
        train = measure_train(batch)
    except DoesNotFit as error:
        raise does_not_fit(config, f"chip of {topology}", programs.shortage(error)) from None
    _print_progress(f"{topology}: compiling the sampling chain …")
    try:
        chain = _measure(topology, lower_chain(config, devices, num), chip, num_chips, num_steps, num_steps)
    except DoesNotFit as error:
        raise UserError(
            f"config.sampling.num={config.sampling.num} ({num} a chip) does not fit into a chip of {topology} "
            f"({programs.shortage(error)}): lower it"
        ) from None
    report = {
        "topology": topology,
        "device": devices[0].device_kind,
        "chips": num_chips,
        "chip": chip._asdict() if chip else None,
        "dtype": config.model.dtype,
        "parameters": parts.num_parameters(config),
        "classes": config.model.num_classes,
        "guidance": config.sampling.guidance if config.model.num_classes else None,
        "train": train | _totals(train, batch, num_chips, 1, config.train.num_steps),
        "sampling": chain | _totals(chain, num, num_chips, num_steps, num_steps * num_calls),
        "largest_batch_per_chip": {"estimate": _estimate_batch(train["memory"], batch, chip) if chip else None},
    }
    _write(report, out)
    print(table(report), flush=True)
    if search and chip:  # last, because it may take long and be interrupted
        largest = _search(measure_train, batch)
        report["largest_batch_per_chip"] |= largest
        print(_largest_line(largest, num_chips))
        _write(report, out)
    return report


def _write(report, out):
    if out:
        files.write_text(out, json.dumps(report, indent=2) + "\n")


def _print_progress(line):
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the chips


def _devices(topology):
    """Returns (devices, Chip or None) of a topology."""
    name, _, shape = topology.partition(":")
    if topology in ("cpu", "gpu"):
        return _local_devices(topology), None
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape):
        raise UserError(f"--topology={topology} is unknown: give {_EXAMPLES}")
    if (num := math.prod(map(int, shape.split("x")))) > CHIPS[name].pod:
        raise UserError(
            f"--topology={topology} has {num:,} chips, but a pod has {CHIPS[name].pod:,}: give a smaller shape"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU's compiler (on Linux): pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    added = {key: value for key, value in _LIBTPU.items() if key not in os.environ}
    os.environ.update(added)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **_EXTRA.get(name, {})).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise _no_compiler(topology, one_line(error, 300)) from None
    finally:
        for key in added:
            del os.environ[key]
    return devices, CHIPS[name]


def _local_devices(platform):
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise UserError(f"--topology={platform}: this machine has none ({reason}): give {_EXAMPLES}") from None


def _no_compiler(topology, reason):
    if "lockfile" in reason or "already in use" in reason:
        return UserError(
            f"--topology={topology}: another process uses libtpu ({reason}): wait until it ends, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        )
    return UserError(f"--topology={topology}: libtpu has no such topology ({reason}): give {_EXAMPLES}")


# ---------------------------------------------------------------------------- the programs


def lower_train_step(config: ConfigDict, devices: Sequence[jax.Device], batch_per_chip: int) -> jax.stages.Lowered:
    """Lowers the train step for `devices` by a shard_map: a pmap cannot be lowered for absent chips."""
    run, num = parts.build(config), batch_per_chip * len(devices)
    step, num_images, in_spec = run.train_step, num, _SPLIT
    if config.data.on_device:
        step, num_images, in_spec = resident(step, 1, config.seed, num), len(parts.source(config)), _REPLICATED
    batch = {"image": jax.ShapeDtypeStruct((num_images, *run.image_shape), jnp.uint8)}
    batch |= {"label": jax.ShapeDtypeStruct((num_images,), jnp.int32)} if run.num_classes else {}
    args = (run.abstract_state(), batch, jax.ShapeDtypeStruct((num,), jnp.int32))
    in_specs = (_REPLICATED, in_spec, _SPLIT)
    return _lower(lambda state, *batch: step(state, batch), devices, args, in_specs, _REPLICATED, donate_argnums=0)


def lower_chain(config: ConfigDict, devices: Sequence[jax.Device], num_per_chip: int) -> jax.stages.Lowered:
    """Lowers the sampling chain for `devices`: the body of `sampling.make_sample_fn`, all steps in its scan."""
    run = parts.build(config)

    def arguments():
        s, sigma = jax.tree.map(jnp.asarray, (run.schedule, run.sigma))
        numbers = jnp.zeros(num_per_chip * len(devices), jnp.int32)
        return jax.random.key(0), numbers, s, sigma, *((numbers,) if run.num_classes else ())  # the last: labels

    args = (run.abstract_state().ema_params, *jax.eval_shape(arguments))
    specs = (_REPLICATED, _REPLICATED, _SPLIT, _REPLICATED, _REPLICATED, _SPLIT)[: len(args)]
    return _lower(run.indexed_sample_fn(), devices, args, specs, _SPLIT)


def _lower(fn, devices, args, in_specs, out_specs, **options):
    mesh = Mesh(np.array(devices), (AXIS,))

    def place(spec, arg):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arg)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, **options).lower(*map(place, in_specs, args))


def _measure(topology, lowered, chip, num_chips, loop_iterations, steps):
    """Returns `programs.needs` of a program and its "compile_seconds", from the cache COMPILED if possible.

    Raises:
      DoesNotFit: the program needs more memory than the chip has.
    """
    versions = (_version("jaxlib"), _version("libtpu"), programs.COUNTING)
    key = (topology, *versions, lowered.as_text(), chip, loop_iterations, steps)
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()[:32]
    file = COMPILED.expanduser() / f"{digest}.json"
    if file.exists():
        needs = json.loads(file.read_text())
    else:
        start = time.monotonic()
        try:
            with _no_compilation_cache():
                program = programs.compiled(lowered)
            needs = programs.needs(program, chip, num_chips, loop_iterations, steps)
            needs["compile_seconds"] = time.monotonic() - start
        except DoesNotFit as error:
            needs = {"does_not_fit": str(error)}
        with contextlib.suppress(OSError):  # without a writable home the next plan compiles again
            files.write_text(file, json.dumps(needs))
    if "does_not_fit" in needs:
        raise DoesNotFit(needs["does_not_fit"])
    return needs


@contextlib.contextmanager
def _no_compilation_cache():
    """Keeps JAX's compilation cache out: it cannot read a program of an absent TPU back, and warns of it."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the flag once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _totals(program, per_chip, num_chips, steps_per_image, num_steps):
    """Returns FLOPs per image and hours in all of `num_steps` steps, each with `per_chip` images on a chip."""
    roofline = program["roofline"]
    hours = roofline["seconds"] * num_steps / 3600 if roofline else None
    return {
        "images_per_chip": per_chip,
        "steps_per_image": steps_per_image,
        "flops_per_image": program["per_chip"]["flops"] * steps_per_image / per_chip,
        "num_steps": num_steps,
        "hours": hours,
        "chip_hours": hours * num_chips if roofline else None,
    }


# ---------------------------------------------------------------------------- the largest batch


def _estimate_batch(memory, batch, chip):
    """Underestimates the images that fit into a chip: assumes that only arguments and code do not grow with them."""
    fixed = memory["arguments"] + memory["code"]
    return int((chip.hbm - fixed) * batch / max(memory["peak"] - fixed, 1))


def _search(compile_with, batch):
    """Returns `largest_power_of_2` of the batches that fit, and prints each try. `batch` itself is known to fit."""

    def fits(n):
        start, verb = time.monotonic(), "fit"
        try:
            compile_with(n)
        except DoesNotFit:
            verb = "do not fit"
        _print_progress(f"{n} images a chip {verb} ({time.monotonic() - start:.0f} s)")
        return verb == "fit"

    _print_progress("searching for the largest batch that fits; a compilation may take many minutes …")
    deadline = time.monotonic() + PATIENCE
    return largest_power_of_2(fits, 2 ** int(math.log2(batch)), LARGEST, lambda: time.monotonic() > deadline)


def largest_power_of_2(
    fits: Callable[[int], bool], start: int, limit: int, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, int | None]:
    """Doubles `start`, a power of two that fits, up to `limit`.

    Args:
      fits: n -> True if n fits.
      should_stop: True ends the search; called before each try.

    Returns:
      {"fits": the largest number that fits, "fails": twice that, or None if it was not tried}.
    """
    n = start
    while 2 * n <= limit and not should_stop():
        if not fits(2 * n):
            return {"fits": n, "fails": 2 * n}
        n *= 2
    return {"fits": n, "fails": None}


def _largest_line(largest, num_chips):
    n, fails = largest["fits"], largest["fails"]
    end = f"{fails:,} do not" if fails else f"{2 * n:,} were not tried"
    return (
        f"Largest power of two found to fit, images per chip and train step: {n:,} (config.train.batch_size="
        f"{n * num_chips}); {end}."
    )


# ---------------------------------------------------------------------------- the table


def table(report: dict[str, Any]) -> str:
    """Returns a plan as Markdown."""
    train, chain = report["train"], report["sampling"]
    head = [
        f"{report['topology']}: {report['chips']:,} × {report['device']}, {report['parameters']:,} parameters, "
        f"{report['dtype']}"
    ]
    if classes := report.get("classes"):
        head.append(f"{classes:,} classes, sampled with guidance {report['guidance']:g}")
    if chip := report["chip"]:
        head.append(
            f"per chip: {chip['flops'] / 1e12:g} TFLOP/s in bfloat16, {_bytes(chip['hbm'])} HBM at "
            f"{chip['bandwidth'] / 1e9:g} GB/s, links of {chip['links'] / 1e9:g} GB/s"
        )
    columns = ("", "train step", f"sampling chain, {chain['steps_per_image']:,} steps")
    lines = markdown_table(columns, [(name, text(train), text(chain)) for name, text in _rows(report)])
    return "\n".join([*head, "", *lines, "", *_notes(report)])


def _rows(report):
    """Returns [(name, program -> text)] for the rows of the table."""
    num, chip = report["chips"], report["chip"]
    rows = [
        ("images: all chips (one)", lambda p: f"{p['images_per_chip'] * num:,} ({p['images_per_chip']:,})"),
        ("FLOPs per image", lambda p: _flops(p["flops_per_image"])),
        ("FLOPs per chip and step", lambda p: _flops(p["per_chip"]["flops"])),
        ("HBM bytes per chip and step", lambda p: _bytes(p["per_chip"]["hbm_bytes"])),
        *((f"memory per chip: {key}", lambda p, key=key: _bytes(p["memory"][key])) for key in _MEMORY),
        ("memory per chip: peak", lambda p: _peak(p["memory"]["peak"], chip)),
        ("collectives per step", lambda p: _collectives(p["collectives"])),
        ("compile time, measured here", lambda p: f"{p['compile_seconds']:.0f} s"),
    ]
    if any(report[name]["optimal_seconds"] for name in ("train", "sampling")):
        rows.append(("the compiler's own estimate", lambda p: _time(p["optimal_seconds"])))
    if not chip:
        return rows
    return [
        *rows,
        ("estimate: FLOPs at the bf16 peak", lambda p: _time(p["roofline"]["compute_seconds"])),
        ("estimate: bytes at the HBM's bandwidth", lambda p: _time(p["roofline"]["memory_seconds"])),
        ("estimate: collectives over the links", lambda p: _time(p["roofline"]["links_seconds"])),
        ("estimate: time per step, at best", lambda p: _time(p["roofline"]["seconds"])),
        ("estimate: bound by", lambda p: p["roofline"]["bound"]),
        ("estimate: share of the bf16 peak", lambda p: f"{p['roofline']['utilisation']:.1%}"),
        ("estimate: hours, at best", lambda p: f"{_number(p['hours'])} ({p['num_steps']:,} steps)"),
        ("estimate: chip-hours, at best", lambda p: _number(p["chip_hours"])),
    ]


def _notes(report):
    notes = [
        f"Sampling: {SAMPLES:,} images in all; the program is the whole chain.",
        "Aliased: outputs that reuse the memory of arguments.",
    ]
    if not report["chip"]:
        return [*notes, "No times: there is no roofline for this device."]
    return [
        *notes,
        "Estimates are max(FLOPs / bf16 peak, bytes / HBM bandwidth) + bytes sent / links. They are not measured: "
        "float32 has a lower peak, and input and output of data are not counted.",
        f"Estimate: about {report['largest_batch_per_chip']['estimate']:,} images a chip and train step fit, or more, "
        "if memory grows evenly with them.",
    ]


def _flops(value):
    """Returns e.g. "1.23 TFLOP" for 1.23e12."""
    power = min(max(int(math.log10(value)) // 3, 0), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def _bytes(value):
    power = min(int(math.log2(value)) // 10, 4) if value >= 1 else 0
    return f"{value / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds):
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _peak(value, chip):
    return _bytes(value) + (f", {value / chip['hbm']:.1%} of the HBM" if chip else "")


def _collectives(totals):
    return ", ".join(f"{entry['count']} {name} of {_bytes(entry['bytes'])}" for name, entry in totals.items()) or "none"
