"""Measures for how long a checkpoint holds up the train step.

    python -m benchmarks.save --config=configs/digits.py

Takes --steps steps, once with a save after the first of them and once without, in turn. The script prints a JSON line:
the bytes of the state, the milliseconds of a step, of the save itself, which the loop waits for, and of the gap, by
which the steps with a save take longer, and the gap in steps. On a CPU the gap contains the writing in the background,
which takes the cores from the steps.
"""

import json
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from diffusion_jax import parts
from diffusion_jax.data import pipeline
from diffusion_jax.running import checkpoint, hosts
from diffusion_jax.running.dispatch import pmapped, replicate, several

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
STEPS = flags.DEFINE_integer("steps", 40, "steps around a save")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed saves")
PLATFORM = flags.DEFINE_string("platform", "", "tpu, gpu or cpu; default: the best that JAX finds")


def main(_: list[str]) -> None:
    hosts.initialize(PLATFORM.value)
    run, batch_size = parts.build(CONFIG.value), CONFIG.value.train.batch_size
    indices = pipeline.indices(batch_size)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *run.image_shape), np.uint8)
    batch = {"image": images[indices][:, None]}
    batch |= {"label": (indices % run.num_classes)[:, None].astype(np.int32)} if run.num_classes else {}
    inputs = pipeline.split((batch, indices))
    program, state = pmapped(several(run.train_step)), replicate(run.init_state())
    times = {"plain": [], "with": [], "save": []}
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_manager(folder) as manager:
        for number in range(-1, 2 * REPEATS.value):  # the first round compiles
            with_save = number % 2 == 1
            checkpoint.wait(manager)
            jax.block_until_ready(state)
            start = time.perf_counter()
            for i in range(STEPS.value):
                state, metrics = program(state, inputs)
                if with_save and i == 0:
                    jax.block_until_ready(state)
                    saving = time.perf_counter()
                    checkpoint.save(manager, number, state)
                    times["save"].append(time.perf_counter() - saving)
            jax.device_get(metrics)
            if number >= 0:
                times["with" if with_save else "plain"].append(time.perf_counter() - start)
    gaps = np.array(times["with"]) - np.array(times["plain"])
    step = statistics.median(times["plain"]) / STEPS.value
    gap = statistics.median(gaps)
    line = {"state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)), "step_ms": round(1e3 * step, 2)}
    line |= {"save_ms": round(1e3 * statistics.median(times["save"]), 1), "gap_ms": round(1e3 * gap, 1)}
    line |= {"gap_spread_ms": [round(1e3 * float(f(gaps)), 1) for f in (min, max)], "gap_steps": round(gap / step, 1)}
    print(json.dumps(line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}))


if __name__ == "__main__":
    app.run(main)
