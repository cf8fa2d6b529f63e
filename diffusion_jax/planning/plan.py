"""What a run needs on a TPU that is not there: its two programs, compiled ahead of time, counted and estimated."""

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

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import topologies
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

SAMPLES = 50_000  # images that the literature's FID takes
LARGEST = 4096  # images per chip and step, beyond which the search does not go
PATIENCE = 900  # seconds of search after which no further compilation begins: large batches take many minutes each
COMPILED = epath.Path("~/.cache/diffusion_jax/plans")  # what compiled programs need: a large one takes many minutes
_REPLICATED, _SPLIT = PartitionSpec(), PartitionSpec(AXIS)


_EXAMPLES = "a TPU and its shape, e.g. v5e:2x4, v6e:16x16, v4:2x2x1 or v5p:2x2x2; cpu; or gpu"
_EXTRA = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device, as where there is a TPU
# libtpu is to ask no metadata server for the machine's own TPU, and to mind no process that uses it.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def plan(config: ConfigDict, topology: str, out: str | None = None, search: bool = True) -> dict:
    """Compiles the train step and the sampling chain of a config for a TPU, prints what they need, and estimates.

    Nothing is run and no array is made, so any Linux machine with the package libtpu will do. The
    programs are those of training and sampling, at config.train.batch_size images over all chips, and
    at config.sampling.num images rounded up to a multiple of the chips. Times are estimates, at best:
    see `roofline`. Keeps JAX from any accelerator of this machine, unless topology is "gpu".

    Args:
      topology: "v5e:2x4": the chips of TPU v4, v5e, v5p or v6e in their shape; "cpu" or "gpu": the
        devices of this machine, for which there is no roofline.
      out: a file for what is returned, JSON; None: none.
      search: after the table, look for the largest power of two that fits as images per chip: one compilation
        of the train step for each doubling, until one fails, or `LARGEST` or `PATIENCE` is reached.

    Returns:
      What is printed, in images, bytes, FLOPs and seconds; "per_chip" is of one step, of training or of the
      chain. None where it is unknown.

    Raises:
      UserError: no such topology or no compiler for it, the batch does not divide among the chips, or
        the config does not fit into their memory.
    """
    devices, chip = _devices(topology)
    num_chips = len(devices)
    check_batch(config, num_chips)
    batch = config.train.batch_size // num_chips
    num = -(-config.sampling.num // num_chips)
    num_steps = config.sampling.steps or config.schedule.num_steps

    def measure(lower, turns, steps=1):
        return _measure(topology, lower, chip, num_chips, turns, steps)

    def measure_train(batch):
        return measure(lambda: lower_train_step(config, devices, batch), config.train.accumulate)

    _say(f"{topology}: the train step …")
    try:
        train = measure_train(batch)
    except DoesNotFit as error:
        raise does_not_fit(config, f"chip of {topology}", programs.shortage(error)) from None
    _say(f"{topology}: the sampling chain …")
    try:
        chain = measure(lambda: lower_chain(config, devices, num), num_steps, num_steps)
    except DoesNotFit as error:
        raise UserError(
            f"config.sampling.num={config.sampling.num} ({num} a chip) does not fit into a chip of {topology} "
            f"({programs.shortage(error)}): lower it"
        ) from None
    calls = -(-SAMPLES // (num * num_chips))
    report = {
        "topology": topology,
        "device": devices[0].device_kind,
        "chips": num_chips,
        "chip": chip._asdict() if chip else None,
        "dtype": config.model.dtype,
        "parameters": parts.num_parameters(config),
        "train": train | _whole(train, batch, num_chips, 1, config.train.num_steps),
        "sampling": chain | _whole(chain, num, num_chips, num_steps, num_steps * calls),
        "largest_batch_per_chip": {"estimate": _room(train["memory"], batch, chip) if chip else None},
    }
    _write(report, out)
    print(table(report), flush=True)
    if search and chip:  # which may take long, and be broken off
        found = _search(measure_train, batch)
        report["largest_batch_per_chip"] |= found
        print(_found(found, num_chips))
        _write(report, out)
    return report


def _write(report, out):
    if out:
        files.write_text(out, json.dumps(report, indent=2) + "\n")


# ---------------------------------------------------------------------------- the chips


def _devices(topology):
    """(devices, Chip or None) of a topology."""
    name, _, shape = topology.partition(":")
    if topology in ("cpu", "gpu"):
        return _local_devices(topology), None
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape):
        raise UserError(f"--topology={topology} is unknown: give {_EXAMPLES}")
    if (num := math.prod(map(int, shape.split("x")))) > CHIPS[name].pod:
        raise UserError(f"--topology={topology} has {num:,} chips, a pod {CHIPS[name].pod:,}: give a smaller shape")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU's compiler (on Linux): pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    added = {key: value for key, value in _LIBTPU.items() if key not in os.environ}
    os.environ.update(added)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **_EXTRA.get(name, {})).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise _no_compiler(topology, one_line(error, 300)) from None
    finally:
        for key in added:
            del os.environ[key]
    return found, CHIPS[name]


def _local_devices(platform):
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        line = one_line(error, 200)
        raise UserError(f"--topology={platform}: this machine has none ({line}): give {_EXAMPLES}") from None


def _no_compiler(topology, line):
    if "lockfile" in line or "already in use" in line:
        return UserError(
            f"--topology={topology}: another process uses libtpu ({line}): wait for its end, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        )
    return UserError(f"--topology={topology}: libtpu has no such topology ({line}): give {_EXAMPLES}")


# ---------------------------------------------------------------------------- the programs


def lower_train_step(config: ConfigDict, devices: Sequence[jax.Device], batch_per_chip: int) -> jax.stages.Lowered:
    """Lowers the train step for `devices` by a shard_map: a pmap cannot be lowered for absent chips."""
    run, num = parts.build(config), batch_per_chip * len(devices)
    step, num_images, in_spec = run.train_step, num, _SPLIT
    if config.data.on_device:
        step, num_images, in_spec = resident(step, 1, config.seed, num), len(parts.source(config)), _REPLICATED
    batch = {"image": jax.ShapeDtypeStruct((num_images, *run.image_shape), jnp.uint8)}
    args = (run.abstract_state(), batch, jax.ShapeDtypeStruct((num,), jnp.int32))
    in_specs = (_REPLICATED, in_spec, _SPLIT)
    return _lower(lambda state, *batch: step(state, batch), devices, args, in_specs, _REPLICATED, donate_argnums=0)


def lower_chain(config: ConfigDict, devices: Sequence[jax.Device], num_per_chip: int) -> jax.stages.Lowered:
    """Lowers the sampling chain for `devices`: the body of `sampling.make_sample_fn`, all steps in its scan."""
    run = parts.build(config)

    def arguments():
        s, sigma = jax.tree.map(jnp.asarray, (run.schedule, run.sigma))
        return jax.random.key(0), jnp.zeros(num_per_chip * len(devices), jnp.int32), s, sigma

    args = (run.abstract_state().ema_params, *jax.eval_shape(arguments))
    specs = (_REPLICATED, _REPLICATED, _SPLIT, _REPLICATED, _REPLICATED)
    return _lower(run.indexed_sample_fn(), devices, args, specs, _SPLIT)


def _lower(fn, devices, args, in_specs, out_specs, **how):
    mesh = Mesh(np.array(devices), (AXIS,))

    def place(spec, arg):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arg)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, **how).lower(*map(place, in_specs, args))


def _measure(topology, lower: Callable, chip, num_chips: int, turns: int, steps: int) -> dict:
    """`programs.needs` of a program, and the "compile_seconds" it took; kept in COMPILED for the next time.

    Raises:
      DoesNotFit: the compiler says so.
    """
    lowered = lower()
    parts = (topology, _version("jaxlib"), _version("libtpu"), programs.COUNTING, lowered.as_text())
    digest = hashlib.sha256("\0".join(map(str, (*parts, chip, turns, steps))).encode()).hexdigest()[:32]
    kept = COMPILED.expanduser() / f"{digest}.json"
    if not kept.exists():
        began = time.monotonic()
        try:
            program = programs.compiled(lowered)
            found = programs.needs(program, chip, num_chips, turns, steps)
            found |= {"compile_seconds": time.monotonic() - began}
        except DoesNotFit as error:
            found = {"does_not_fit": str(error)}
        with contextlib.suppress(OSError):  # without a home it compiles again
            files.write_text(kept, json.dumps(found))
    else:
        found = json.loads(kept.read_text())
    if "does_not_fit" in found:
        raise DoesNotFit(found["does_not_fit"])
    return found


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------- of a whole run


def _whole(program, per_chip, num_chips, steps_per_image, num_steps):
    """What follows for `num_steps` steps in all, of `per_chip` images a chip."""
    line = program["roofline"]
    hours = line["seconds"] * num_steps / 3600 if line else None
    return {
        "images_per_chip": per_chip,
        "steps_per_image": steps_per_image,
        "flops_per_image": program["per_chip"]["flops"] * steps_per_image / per_chip,
        "num_steps": num_steps,
        "hours": hours,
        "chip_hours": hours * num_chips if line else None,
    }


# ---------------------------------------------------------------------------- the largest batch


def _room(memory, batch, chip):
    """Images that a chip may hold, if all memory but arguments and code grows with the batch: a low estimate."""
    fixed = memory["arguments"] + memory["code"]
    return int((chip.hbm - fixed) * batch / max(memory["peak"] - fixed, 1))


def _search(compile_with: Callable, batch: int) -> dict:
    """`largest_power_of_2` of what compiles, as it goes told on stderr; a batch of `batch` does."""

    def fits(n):
        began = time.monotonic()
        try:
            compile_with(n)
        except DoesNotFit:
            _say(f"{n} images a chip do not fit ({time.monotonic() - began:.0f} s)")
            return False
        _say(f"{n} images a chip fit ({time.monotonic() - began:.0f} s)")
        return True

    _say("looking for the largest batch that fits; a compilation may take many minutes …")
    deadline = time.monotonic() + PATIENCE
    return largest_power_of_2(fits, 2 ** int(math.log2(batch)), LARGEST, lambda: time.monotonic() > deadline)


def largest_power_of_2(fits: Callable, start: int, limit: int, tired: Callable = lambda: False) -> dict:
    """Doubles `start`, a power of two that fits, up to `limit`: {"fits": the largest, "fails": twice that, or None}.

    Args:
      fits: number -> whether it does.
      tired: asked before each try; if true, the search ends.
    """
    n = start
    while 2 * n <= limit and not tired():
        if not fits(2 * n):
            return {"fits": n, "fails": 2 * n}
        n *= 2
    return {"fits": n, "fails": None}


def _found(found, num_chips):
    n, fails = found["fits"], found["fails"]
    end = f"{fails:,} do not" if fails else f"{2 * n:,} were not tried"
    return (
        f"Largest power of two found to fit, images per chip and train step: {n:,} (config.train.batch_size="
        f"{n * num_chips}); {end}."
    )


def _say(line):
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the table


def table(report: dict) -> str:
    """A plan as it is printed, Markdown."""
    train, chain, num = report["train"], report["sampling"], report["chips"]
    head_row = ("", "train step", f"sampling chain, {chain['steps_per_image']:,} steps")
    lines = markdown_table(head_row, [(name, fn(train), fn(chain)) for name, fn in _rows(report)])
    head = [
        f"{report['topology']}: {num:,} × {report['device']}, {report['parameters']:,} parameters, {report['dtype']}"
    ]
    if chip := report["chip"]:
        head.append(
            f"a chip: {chip['flops'] / 1e12:g} TFLOP/s in bfloat16, {_bytes(chip['hbm'])} HBM at "
            f"{chip['bandwidth'] / 1e9:g} GB/s, links of {chip['links'] / 1e9:g} GB/s"
        )
    return "\n".join([*head, "", *lines, "", *_notes(report)])


def _rows(report):
    """[(name, program -> text)]."""
    num = report["chips"]
    rows = [
        ("images: all chips (one)", lambda p: f"{p['images_per_chip'] * num:,} ({p['images_per_chip']:,})"),
        ("FLOPs per image", lambda p: f"{_si(p['flops_per_image'])}FLOP"),
        ("FLOPs per chip and step", lambda p: f"{_si(p['per_chip']['flops'])}FLOP"),
        ("HBM bytes per chip and step", lambda p: _bytes(p["per_chip"]["hbm_bytes"])),
        *((f"memory per chip: {key}", lambda p, key=key: _bytes(p["memory"][key])) for key in _MEMORY),
        ("memory per chip: peak", lambda p: _peak(p["memory"]["peak"], report["chip"])),
        ("collectives per step", lambda p: _collectives(p["collectives"])),
        ("compile time, measured here", lambda p: f"{p['compile_seconds']:.0f} s"),
    ]
    if any(report[name]["optimal_seconds"] for name in ("train", "sampling")):
        rows.append(("the compiler's own estimate", lambda p: _time(p["optimal_seconds"])))
    if not report["chip"]:
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


_MEMORY = ("arguments", "outputs", "aliased", "temporaries", "code")


def _notes(report):
    notes = [
        f"Sampling: {SAMPLES:,} images in all; compiled is the whole chain.",
        "Aliased: outputs that take the place of arguments.",
    ]
    if report["chip"]:
        notes.append(
            "Estimates are max(FLOPs / bf16 peak, bytes / HBM bandwidth) + bytes sent / links. They are not measured: "
            "float32 has a lower peak, and input and output of data are left out."
        )
        room = report["largest_batch_per_chip"]["estimate"]
        notes.append(
            f"Estimate: about {room:,} images a chip and train step fit, or more: if memory grows with them evenly."
        )
    else:
        notes.append("No times: there is no roofline for this device.")
    return notes


def _si(value):
    """1.23e12 as "1.23 T"."""
    power = min(max(int(math.log10(value)) // 3, 0), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


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


def _collectives(found):
    return ", ".join(f"{entry['count']} {name} of {_bytes(entry['bytes'])}" for name, entry in found.items()) or "none"
