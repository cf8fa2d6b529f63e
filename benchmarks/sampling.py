"""Compares the scanned sampling chain with a Python loop of its jitted step, and with chains that have a window.

    python -m benchmarks.sampling --config=configs/digits.py

The variants take turns, --pairs times. The script prints a JSON line for each: the median of the milliseconds per step,
and the median and spread of their ratio to the scan of the same turn.
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
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts, sampling

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
BATCH = flags.DEFINE_integer("batch", 64, "images in the chain")
STEPS = flags.DEFINE_integer("steps", 200, "timed steps of the chain")
PAIRS = flags.DEFINE_integer("pairs", 7, "measurements of each variant")


def seconds(run: Callable[..., jax.Array], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def variants(config: ConfigDict, num_steps: int) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Returns {name: function} for the last `num_steps` steps of the chain, from x_t to x_0."""
    s, sigma = parts.schedule(config), parts.sigma(config)
    apply_fn = parts.network(config)
    shape = (BATCH.value, *parts.image_shape(config))
    params = parts.model(config).init(jax.random.key(0), jnp.zeros(shape), jnp.ones(shape[0], jnp.int32))
    keys = jax.random.split(jax.random.key(1), shape[0])

    def chain(x, window=None):
        return sampling.reverse_chain(
            lambda x, t: apply_fn(params, x, t), s, sigma, x, keys, num_steps, clip=(-1.0, 1.0), window=window
        )

    step = jax.jit(
        lambda x, t: sampling.ancestral_step(lambda x, t: apply_fn(params, x, t), s, sigma, x, keys, t, (-1.0, 1.0))[0]
    )

    def loop(x):
        for t in range(num_steps, 0, -1):
            x = step(x, t)
        return x

    report = sampling.Window(lambda t: None, every=max(1, num_steps // 100))
    preview = sampling.Window(lambda t, x_0: None, every=max(1, num_steps // 10), look=lambda x, x_0: x_0)
    return {
        "scan": jax.jit(chain),
        "loop": loop,
        "scan, reports 100 times": jax.jit(lambda x: chain(x, report)),
        "scan, 10 previews": jax.jit(lambda x: chain(x, preview)),
    }


def main(_: list[str]) -> None:
    config = CONFIG.value
    x = jax.random.normal(jax.random.key(2), (BATCH.value, *parts.image_shape(config)))
    runs = variants(config, STEPS.value)
    times = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run(x))  # compiles
    for _ in range(PAIRS.value):
        for name, run in runs.items():
            times[name].append(1000 * seconds(run, x) / STEPS.value)
    for name, values in times.items():
        ratios = np.array(values) / np.array(times["scan"])
        line = {"run": name, "ms_per_step": round(statistics.median(values), 3)}
        line |= {
            "to_scan": round(float(np.median(ratios)), 3),
            "spread": [round(float(f(ratios)), 3) for f in (min, max)],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
