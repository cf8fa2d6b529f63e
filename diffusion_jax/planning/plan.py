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
from diffusion_jax.planning import growth, programs
from diffusion_jax.planning.fit import does_not_fit, parts_of_device
from diffusion_jax.planning.prices import Price, read_prices
from diffusion_jax.planning.programs import CHIPS, Chip, DoesNotFit
from diffusion_jax.planning.table import SAMPLES, comparison, growth_table, table
from diffusion_jax.running import files
from diffusion_jax.running.config import check_batch
from diffusion_jax.running.dispatch import resident
from diffusion_jax.step import AXIS

LARGEST = 4096  # images per chip and step at which the search ends
PATIENCE = 900  # seconds after which the search starts no compilation: large batches take many minutes each
COMPILED = epath.Path("~/.cache/diffusion_jax/plans")  # caches the needs of programs: a compilation may take minutes
_REPLICATED, _SPLIT = PartitionSpec(), PartitionSpec(AXIS)

_EXAMPLES = "a TPU and its shape, e.g. v5e:2x4, v6e:16x16, v4:2x2x1 or v5p:2x2x2; cpu; or gpu"
_EXTRA = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device, as on a real TPU
# Keeps libtpu from asking a metadata server for this machine's TPU, and from locking out other processes.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def plan(
    config: ConfigDict,
    topology: str,
    out: epath.PathLike | None = None,
    search: bool = True,
    prices: epath.PathLike | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Compiles the train step and the sampling chain of a config for a topology, and prints their needs.

    Nothing runs and no array is allocated, so any Linux machine with the package libtpu will do. The programs
    are those of training and sampling, for config.train.batch_size images over all chips, and for
    config.sampling.num images rounded up to a multiple of the chips. Times are lower bounds, see
    `programs.roofline`. JAX uses no accelerator of this machine unless the topology is "gpu".

    Args:
      topology: chips of TPU v4, v5e, v5p, v6e or TPU7x and their shape, e.g. "v5e:2x4"; or "cpu" or "gpu" for the
        devices of this machine, which have no roofline. Several of them, with commas between, are compared.
      out: a JSON file for the result, or None.
      search: True also searches, after the table of a single topology, for the largest power of two of images per chip
        that fits. Each doubling compiles the train step, until one fails or LARGEST or PATIENCE is reached.
      prices: see `prices.read_prices`.

    Returns:
      The printed numbers, in images, bytes, FLOPs, seconds and US dollars, of each topology if there are several;
      "per_chip" is for one step of training or of the chain, and for one device of a chip that has several. Unknown
      values are None. A topology that cannot train the config has the reason under "refused".

    Raises:
      UserError: a topology or its compiler does not exist, the prices cannot be read, or the one topology does not
        divide the batch or hold the config.
    """
    config, price_of = parts.with_classes(config), read_prices(prices)
    names = topology.split(",")
    all_devices = {name: _devices(name) for name in names}  # before the first compilation
    if len(names) > 1:
        return _plan_several(config, all_devices, price_of, out)
    devices, chip = all_devices[topology]
    report = _plan(config, topology, devices, chip, price_of)
    _write(report, out)
    print(table(report), growth_table(report), sep="\n\n", flush=True)
    if search and chip:  # last, because it may take long and be interrupted
        largest = _search(lambda batch: _measure_step(config, topology, devices, chip, batch), _images(config, devices))
        report["largest_batch_per_chip"] |= largest
        print(_largest_line(largest, len(devices)))
        _write(report, out)
    return report


def _plan_several(config, all_devices, price_of, out):
    reports: list[dict[str, Any]] = []
    for name, (devices, chip) in all_devices.items():
        try:
            reports.append(_plan(config, name, devices, chip, price_of))
            print(table(reports[-1]), end="\n\n", flush=True)
        except UserError as error:  # the others may hold it
            reports.append({"topology": name, "refused": str(error)})
        _write(reports, out)
    print(comparison(reports))
    return reports


def _plan(config, topology, devices, chip, price_of: dict[str, Price]):
    """Returns the report of one topology, without a search.

    Raises:
      UserError: the batch does not divide among the devices, or the config does not fit into their memory.
    """
    n = len(devices)
    check_batch(config, n)
    batch, num = _images(config, devices), -(-config.sampling.num // n)
    num_steps, num_calls = parts.num_sampling_steps(config), -(-SAMPLES // (num * n))
    _print_progress(f"{topology}: compiling the train step …")
    try:
        train = _measure_step(config, topology, devices, chip, batch)
    except DoesNotFit as error:
        raise does_not_fit(config, f"chip of {topology}", programs.shortage(error)) from None
    _print_progress(f"{topology}: compiling the sampling chain …")
    try:
        chain = _measure(topology, lower_chain(config, devices, num), chip, n, num_steps, num_steps)
    except DoesNotFit as error:
        raise UserError(
            f"config.sampling.num={config.sampling.num} ({num} a chip) does not fit into a chip of {topology} "
            f"({programs.shortage(error)}): lower it"
        ) from None
    chips, price = n // (chip.devices if chip else 1), price_of.get(topology.partition(":")[0])
    return {
        "topology": topology,
        "device": devices[0].device_kind,
        "devices": n,
        "chips": chips,
        "chip": chip._asdict() if chip else None,
        "price": price._asdict() if price else None,
        "dtype": config.model.dtype,
        "parameters": parts.num_parameters(config),
        "classes": config.model.num_classes,
        "guidance": config.sampling.guidance if config.model.num_classes else None,
        "train": train | _totals(train, batch, chips, price, 1, config.train.num_steps),
        "sampling": chain | _totals(chain, num, chips, price, num_steps, num_steps * num_calls),
        "largest_batch_per_chip": {"estimate": _estimate_batch(train["memory"], batch, chip) if chip else None},
        **_growth(config, train, chip, batch, n),
    }


def _images(config, devices):
    """Returns the images of a train step on each device."""
    return config.train.batch_size // len(devices)


def _measure_step(config, topology, devices, chip, batch):
    """Returns `_measure` of the train step with `batch` images on each device."""
    lowered = lower_train_step(config, devices, batch)
    return _measure(topology, lowered, chip, len(devices), parts_of_device(config, len(devices)), 1)


def _growth(config, train, chip: Chip | None, batch, num_devices):
    """Returns the train step on other numbers of devices, and the most of them that pay; None without a chip."""
    if not chip:
        return {"growth": None, "pays": None}
    pod = chip.pod * chip.devices
    of_sizes = growth.sizes(chip, train["per_chip"], batch, num_devices, parts.num_parameters(config), pod)
    return {"growth": [size._asdict() for size in of_sizes], "pays": growth.pays(of_sizes)._asdict()}


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
    dtype = jnp.float32 if config.data.range else jnp.uint8  # see `arrays`
    batch = {"image": jax.ShapeDtypeStruct((num_images, *run.image_shape), dtype)}
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


def _totals(program, per_chip, num_chips, price, steps_per_image, num_steps):
    """Returns FLOPs per image, and hours and dollars of `num_steps` steps, each with `per_chip` images on a device."""
    roofline = program["roofline"]
    hours = roofline["seconds"] * num_steps / 3600 if roofline else None
    rates = {"on_demand": price.on_demand, "spot": price.spot} if roofline and price else {}
    return {
        "images_per_chip": per_chip,
        "steps_per_image": steps_per_image,
        "flops_per_image": program["per_chip"]["flops"] * steps_per_image / per_chip,
        "num_steps": num_steps,
        "hours": hours,
        "chip_hours": hours * num_chips if roofline else None,
        "dollars": {kind: rate * hours * num_chips for kind, rate in rates.items()} or None,
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
