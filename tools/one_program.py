"""Shows that the sampling chain is one program of a size that does not depend on T.

    python -m tools.one_program --config=configs/digits.py

The script compiles the chain for T = 10 and T = 1000 in turn, and prints for each the seconds that XLA takes and the
number of instructions of the optimised program.
"""

import re
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts, sampling

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
REPEATS = flags.DEFINE_integer("repeats", 3, "compilations for each T, of which the median is printed")
BATCH = flags.DEFINE_integer("batch", 16, "images in the chain")


def compile_chain(config: ConfigDict, batch: int) -> tuple[float, int]:
    """Compiles the chain; returns the seconds and the number of instructions."""
    model, s = parts.model(config), parts.schedule(config)
    shape = (batch, *parts.image_shape(config))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]

    def chain(params, s, sigma, x, keys):
        return sampling.reverse_chain(lambda x, t: model.apply({"params": params}, x, t), s, sigma, x, keys)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    lowered = jax.jit(chain).lower(params, s, parts.sigma(config), x, keys)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return seconds, len(re.findall(r"^\s*(?:ROOT )?%?\S+ = ", compiled.as_text(), re.MULTILINE))


def main(_: list[str]) -> None:
    runs = {10: [], 1000: []}
    for _ in range(REPEATS.value):
        for num_steps, results in runs.items():
            CONFIG.value.schedule.num_steps = num_steps
            results.append(compile_chain(CONFIG.value, BATCH.value))
    for num_steps, results in runs.items():
        seconds, instructions = zip(*results, strict=True)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"T = {num_steps}: {statistics.median(seconds):.2f} s ({spread}), {instructions[0]} instructions")


if __name__ == "__main__":
    app.run(main)
