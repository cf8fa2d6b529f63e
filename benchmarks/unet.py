"""Measures the forward pass, the train step and a step of the chain, relative to a large matrix product.

    python -m benchmarks.unet --config=configs/cifar10.py --batch=16

The benchmarks take turns, --repeats times, so that a slow phase of the machine affects all of them. The script prints a
JSON line for each: the median and the spread of the milliseconds, images and FLOPs per second, and the FLOPs per
second as a share of those of a large matrix product in the same dtype. FLOPs are those of matrix products and
convolutions. Inputs are random, because accelerators multiply constants faster. On accelerators take --calls=5
or so: the device then computes one call while the host starts the next, as in a training.

--trace=FOLDER also writes a trace of each program's calls, and prints of it the milliseconds of a step in which the
device computes, those of its operations added over all threads, the operations that it starts in a step, and those that
take the longest, in milliseconds of a step.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts, sampling
from diffusion_jax.planning import programs
from diffusion_jax.running import hosts, profile
from diffusion_jax.running.dispatch import pmapped, replicate, several

CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
BATCH = flags.DEFINE_integer("batch", 16, "images on all devices together")
REPEATS = flags.DEFINE_integer("repeats", 7, "measurements of each benchmark")
STEPS = flags.DEFINE_integer("steps", 2, "steps of the chain in one program")
CALLS = flags.DEFINE_integer("calls", 1, "calls of a program in a measurement, which waits for the last one")
TRACE = flags.DEFINE_string("trace", "", "folder of the traces, for xprof and Perfetto; default: none")
PLATFORM = flags.DEFINE_string("platform", "", "tpu, gpu or cpu; default: the best that JAX finds")
NAMES = ("forward", "train step", "chain step")


class Run:
    """A program and its arguments; `seconds()` runs it.

    Args:
      program: a jitted or pmapped function.
      *args: its arguments.
      images: in a call.
      steps: in a call.
      state: True if the first argument is donated, and the first result takes its place in the next call.
    """

    def __init__(
        self, program: Callable[..., Any], *args: Any, images: int = 0, steps: int = 1, state: bool = False
    ) -> None:
        self.lowered = program.lower(*args)
        self.flops = programs.model_flops(jax.make_jaxpr(program)(*args).jaxpr) / steps  # of a step
        self.images, self.steps = images, steps
        self._program, self._args, self._state = program, args, state
        self.seconds()  # compiles

    def seconds(self, calls: int = 1) -> float:
        """Calls the program so many times, waits for the last one, and returns the seconds per step."""
        start = time.perf_counter()
        for _ in range(calls):
            results = self._program(*self._args)
            if self._state:
                self._args = (results[0], *self._args[1:])
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (calls * self.steps)


def matmul(dtype: str, size: int) -> Run:
    """Returns the product of two square matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return Run(jax.jit(lambda a, b: a @ b), a, b)


def _noise(config, batch):
    return jax.random.normal(jax.random.key(0), (batch, *parts.image_shape(config)))


def forward(config: ConfigDict, batch: int) -> Run:
    """Returns the forward pass without dropout, on one device."""
    params = jax.device_put(parts.build(config).init_state().params)
    x, t = _noise(config, batch), jnp.full(batch, 500)
    apply_fn = parts.network(config)
    return Run(jax.jit(lambda params, x, t: apply_fn({"params": params}, x, t)), params, x, t, images=batch)


def train_step(config: ConfigDict, batch: int) -> Run:
    """Returns the train step on all devices: gradient, clipping, Adam, average of the parameters, metrics."""
    devices = jax.device_count()
    shape = (devices, 1, batch // devices, *parts.image_shape(config))
    batches = {"image": np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)}
    indices = np.arange(batch).reshape(devices, -1)
    program = pmapped(several(parts.train_step(config)))
    return Run(program, replicate(parts.build(config).init_state()), (batches, indices), images=batch, state=True)


def chain(config: ConfigDict, batch: int, steps: int) -> Run:
    """Returns `steps` steps of the ancestral chain in one program, on one device."""
    s, sigma, apply_fn = parts.schedule(config), parts.sigma(config), parts.network(config)
    params = jax.device_put(parts.build(config).init_state().params)
    x, keys = _noise(config, batch), jax.random.split(jax.random.key(0), batch)

    def program(params, x, keys):
        def eps_bar_fn(x, t):
            return apply_fn({"params": params}, x, t)

        return sampling.reverse_chain(eps_bar_fn, s, sigma, x, keys, stop=s.num_steps - steps, clip=(-1.0, 1.0))

    return Run(jax.jit(program), params, x, keys, images=batch, steps=steps)


def runs(config: ConfigDict, batch: int, steps: int) -> dict[str, Run]:
    """Returns the benchmarks of the network by NAMES."""
    made = forward(config, batch), train_step(config, batch), chain(config, batch, steps)
    return dict(zip(NAMES, made, strict=True))


def traced(run: Run, folder: epath.Path) -> dict[str, Any]:
    """Writes a trace of --calls calls, and returns what it tells of a step."""
    profile.start(folder)
    run.seconds(CALLS.value)
    jax.profiler.stop_trace()
    found, steps = profile.read(folder)[1], CALLS.value * run.steps
    operations = {name: round(1e3 * seconds / steps, 3) for name, seconds in found.operations}
    times = {"busy_ms": round(1e3 * found.busy / steps, 3), "work_ms": round(1e3 * found.work / steps, 3)}
    return {**times, "launches": found.launches / steps, "operations": operations}


def main(_: list[str]) -> None:
    hosts.initialize(PLATFORM.value)
    config, device = CONFIG.value, jax.devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    benchmarks = {"matmul": matmul(config.model.dtype, size), **runs(config, BATCH.value, STEPS.value)}
    times = {name: [] for name in benchmarks}
    for _ in range(REPEATS.value):
        for name, run in benchmarks.items():
            times[name].append(run.seconds(CALLS.value))
    peak = benchmarks["matmul"].flops / min(times["matmul"])  # FLOPs per second of the fastest product
    for name, run in benchmarks.items():
        median = statistics.median(times[name])
        line = {"run": name, "device": device.device_kind, "jax": jax.__version__, "dtype": config.model.dtype}
        line |= {"batch": run.images, "ms": round(1e3 * median, 3)}
        line |= {"spread": [round(1e3 * f(times[name]), 3) for f in (min, max)]}
        line |= {"images_per_second": round(run.images / median, 2), "gflops": round(run.flops / median / 1e9, 1)}
        line |= {"of_matmul_peak": round(run.flops / median / peak, 3)}
        line |= traced(run, epath.Path(TRACE.value) / name.replace(" ", "_")) if TRACE.value else {}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
