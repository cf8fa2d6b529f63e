"""Compares the times that --mode=plan would foretell for this machine with those of the same programs.

    python -m benchmarks.roofline --config=configs/cifar10.py --batch=16

A plan's roofline takes a chip's published FLOPs and bandwidth. This one takes the speed of a large matrix product and
of a copy on this machine, measured in turn with the programs. The script prints a JSON line for each program: the
foretold and the measured milliseconds, and the second divided by the first.
"""

import json
import math
import statistics

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import unet
from diffusion_jax.planning import programs
from diffusion_jax.running import hosts

FLAGS = flags.FLAGS
COPIED = 2**26  # float32 numbers


def copy(size: int) -> unet.Run:
    """Returns a program that reads and writes `size` float32 numbers."""
    return unet.Run(jax.jit(lambda x: x + 1), jnp.zeros(size))


def main(_: list[str]) -> None:
    hosts.initialize(FLAGS.platform)
    config, device = FLAGS.config, jax.devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    references = {"matmul": unet.matmul(config.model.dtype, size), "copy": copy(COPIED)}
    network = unet.runs(config, FLAGS.batch, FLAGS.steps)
    times = {name: [] for name in (*references, *network)}
    for _ in range(FLAGS.repeats):
        for name, run in (references | network).items():
            times[name].append(run.seconds(FLAGS.calls))
    peak = references["matmul"].flops / min(times["matmul"])
    bandwidth = 2 * 4 * COPIED / min(times["copy"])
    chip = programs.Chip(peak, 0, bandwidth, math.inf, 1)
    for name, run in network.items():
        needs = programs.needs(run.lowered.compile(), None, jax.device_count(), run.steps, run.steps)
        foretold = programs.roofline(chip, **needs["per_chip"] | {"flops": run.flops})
        measured = statistics.median(times[name])
        line = {"run": name, "device": device.device_kind, "jax": jax.__version__, "batch": FLAGS.batch}
        line |= {"peak_gflops": round(peak / 1e9, 1), "gigabytes_per_second": round(bandwidth / 1e9, 2)}
        line |= {"foretold_ms": round(1e3 * foretold["seconds"], 2), "measured_ms": round(1e3 * measured, 2)}
        line |= {"bound": foretold["bound"], "measured_over_foretold": round(measured / foretold["seconds"], 2)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
