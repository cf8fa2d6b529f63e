"""Measures the cost of dispatching a step: the pmapped train step against the same step under jit with NamedSharding.

    python -m benchmarks.dispatch --devices=1,2 --platform=cpu

pmap and jit handle every array of the state at every step. The network has as many arrays as that of --config, but
only --channels channels, so that the computation is small. The script prints JSON lines with medians over --repeats
measurements of --steps steps; the variants take turns.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts
from diffusion_jax.step import AXIS, TrainState

CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
CHANNELS = flags.DEFINE_integer("channels", 4, "config.model.channels")
SIZE = flags.DEFINE_integer("size", 8, "config.data.image_size")
DEVICES = flags.DEFINE_list("devices", ["1"], "numbers of devices to measure")
STEPS = flags.DEFINE_integer("steps", 50, "steps in a measurement")
REPEATS = flags.DEFINE_integer("repeats", 9, "measurements of each variant")
PLATFORM = flags.DEFINE_string("platform", "", "tpu, gpu or cpu; cpu gets as many devices as --devices needs")


def pmapped_step(step: Callable[..., Any], devices: Sequence[jax.Device]) -> Callable[..., Any]:
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, 0), donate_argnums=0, devices=list(devices)
    )


def jitted_step(step: Callable[..., Any], devices: Sequence[jax.Device]) -> Callable[..., Any]:
    mesh = Mesh(np.array(devices), (AXIS,))
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=(whole, whole), check_vma=False)
    shardings = NamedSharding(mesh, whole), NamedSharding(mesh, split)
    return jax.jit(mapped, in_shardings=shardings, donate_argnums=0)


def run_steps(step: Callable[..., Any], state: TrainState, batch: Any, num: int) -> tuple[float, TrainState]:
    """Starts `num` steps, waits for the last; returns the seconds per step and the state."""
    start = time.perf_counter()
    for _ in range(num):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / num, state


def measure(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[dict[str, list[float]], int]:
    """Returns the milliseconds per step of each variant and measurement, and the number of arrays in the state."""
    batch, shape = len(devices), parts.image_shape(config)
    images, indices = np.zeros((batch, *shape), np.uint8), np.arange(batch)
    mesh = Mesh(np.array(devices), (AXIS,))
    step, split = parts.train_step(config), NamedSharding(mesh, PartitionSpec(AXIS))
    batches = {"jit": ({"image": images}, indices), "pmap": ({"image": images[:, None]}, indices[:, None])}
    batches = {name: jax.device_put(batch, split) for name, batch in batches.items()}
    steps = {"jit": jitted_step(step, devices), "pmap": pmapped_step(step, devices)}
    states = {
        name: jax.device_put(parts.build(config).init_state(), NamedSharding(mesh, PartitionSpec())) for name in steps
    }
    times = {name: [] for name in steps}
    for name, step in steps.items():
        _, states[name] = run_steps(step, states[name], batches[name], 2)  # compiles
    for _ in range(REPEATS.value):
        for name, step in steps.items():
            seconds, states[name] = run_steps(step, states[name], batches[name], STEPS.value)
            times[name].append(1e3 * seconds)
    return times, len(jax.tree.leaves(states["jit"]))


def main(_: list[str]) -> None:
    numbers = [int(number) for number in DEVICES.value]
    if PLATFORM.value:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(PLATFORM.value, PLATFORM.value))
    if PLATFORM.value == "cpu":
        jax.config.update("jax_num_cpu_devices", max(numbers))
    config = CONFIG.value
    config.model.channels, config.data.image_size = CHANNELS.value, SIZE.value
    config.model.attention_resolutions = (SIZE.value // 2,)
    for number in numbers:
        times, arrays = measure(config, jax.devices()[:number])
        difference = [a - b for a, b in zip(times["pmap"], times["jit"], strict=True)]
        line = {"devices": number, "device": jax.devices()[0].device_kind, "jax": jax.__version__, "arrays": arrays}
        line |= {f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()}
        line |= {"pmap_less_jit_ms": round(statistics.median(difference), 3)}
        line |= {"spread": [round(f(difference), 3) for f in (min, max)]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
