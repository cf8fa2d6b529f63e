"""Compares each memory or speed option of the train step with the plain step: in numbers, time and memory.

    python -m benchmarks.levers --config=configs/digits.py

Each variant takes the same --steps steps from the same initial state, on all devices. The script prints a JSON line
for each: the largest difference of a loss and of a parameter from the plain run, 0 for the same bits; the time per step
relative to the plain step, as median and spread over --repeats more runs, each beside a plain one; and the bytes of the
program's temporary arrays.
"""

import json
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts
from diffusion_jax.data import cache, pipeline
from diffusion_jax.running import hosts
from diffusion_jax.running.dispatch import pmapped, replicate, resident, several

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
STEPS = flags.DEFINE_integer("steps", 20, "steps in a run")
TOGETHER = flags.DEFINE_integer("together", 10, "config.train.steps_per_dispatch, a divisor of --steps")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each variant")
PLATFORM = flags.DEFINE_string("platform", "", "tpu, gpu or cpu; default: the best that JAX finds")

# The overrides of each variant; None stands for --together. Those that take the longest come last.
LEVERS = {
    "plain": {},
    "data.on_device": {"data.on_device": True},
    "train.remat": {"train.remat": True},
    "model.dtype=bfloat16": {"model.dtype": "bfloat16"},
    "train.steps_per_dispatch": {"train.steps_per_dispatch": None},
    "train.accumulate=2": {"train.accumulate": 2},
    "train.deterministic": {"train.deterministic": True, "train.accumulate": 8},
}


class Variant:
    """A train step with a config; `seconds()` runs it from the start, and keeps the losses and the parameters."""

    def __init__(self, config: ConfigDict, images: cache.Cached | cache.OnTheFly) -> None:
        self._config, self._start = config, parts.build(config).init_state()
        self._k, self._batch = config.train.steps_per_dispatch, config.train.batch_size
        self._indices = pipeline.indices(self._batch)
        step = parts.train_step(config)
        if config.data.on_device:
            self._program, self._feed = pmapped(resident(step, self._k, config.seed, self._batch), None), None
            self._images = replicate(images.examples(np.arange(len(images))))
        else:
            self._program = pmapped(several(step))
            self._feed = pipeline.batches(images, seed=config.seed, batch_size=self._batch)
        state, batch = replicate(self._start), self._inputs(0)
        self.temporaries = self._program.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
        self.seconds()

    def _inputs(self, step):
        if self._feed is None:
            return self._images, self._indices
        batches = jax.tree.map(lambda *x: np.stack(x), *(self._feed[step + i] for i in range(self._k)))
        return jax.tree.map(lambda x: x[:, self._indices].swapaxes(0, 1), batches), self._indices

    def seconds(self) -> float:
        """Takes --steps steps; returns the seconds per step."""
        state, losses = replicate(self._start), []
        jax.block_until_ready(state)
        start = time.perf_counter()
        for step in range(0, STEPS.value, self._k):
            state, metrics = self._program(state, self._inputs(step))
            losses.append(metrics["loss"])
        self.params = jax.device_get(state.params)
        seconds = time.perf_counter() - start
        self.losses = np.concatenate([np.asarray(loss)[0] for loss in losses])
        return seconds / STEPS.value


def with_overrides(config: ConfigDict, overrides: dict[str, Any]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        section, name = key.split(".")
        config[section][name] = TOGETHER.value if value is None else value
    return config


def main(_: list[str]) -> None:
    hosts.initialize(PLATFORM.value)
    images = parts.images(CONFIG.value)
    plain = Variant(CONFIG.value, images)
    for name, keys in LEVERS.items():
        variant = Variant(with_overrides(CONFIG.value, keys), images)
        times, of_plain = np.array([(variant.seconds(), plain.seconds()) for _ in range(REPEATS.value)]).T
        ratios = times / of_plain
        differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), variant.params, plain.params)
        line = {"lever": name, "loss_difference": float(np.abs(variant.losses - plain.losses).max())}
        line |= {"parameter_difference": max(jax.tree.leaves(differences)), "last_loss": float(variant.losses[-1])}
        line |= {"time_to_plain": round(float(np.median(ratios)), 3)}
        line |= {"spread": [round(float(f(ratios)), 3) for f in (min, max)]}
        line |= {"ms": round(1e3 * float(np.median(times)), 2), "temporaries": variant.temporaries}
        print(json.dumps(line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    app.run(main)
