"""Measures the input pipeline: its speed from the cache and on the fly, and its memory.

    python -m benchmarks.pipeline --config=configs/celeba.py --config.data.path=img_align_celeba.zip

The script prints JSON lines: images per CPU-second and per second, as median and spread of --repeats measurements,
and the resident memory after each of three epochs from the cache.
"""

import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import parts
from diffusion_jax.data import cache, pipeline

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "measurements of the cache, and of decoding on the fly")
SECONDS = flags.DEFINE_float("seconds", 2.0, "seconds of a measurement")


def iterate(images: cache.Cached | cache.OnTheFly, config: ConfigDict) -> Iterator[np.ndarray]:
    batches = pipeline.batches(images, seed=0, batch_size=config.train.batch_size)
    return pipeline.iterate(batches, 0, images.num_threads)


def measure(batches: Iterator[np.ndarray], seconds: float) -> tuple[float, float]:
    """Returns the images per CPU-second and per second, measured over about `seconds`."""
    for _ in range(3):
        next(batches)
    wall, cpu, num = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        num += len(next(batches)["image"])
    return num / (time.process_time() - cpu), num / (time.perf_counter() - wall)


def resident_mb() -> int:
    """Returns the resident memory of this process in MB, file pages included."""
    with open("/proc/self/status") as file:
        return round(int(file.read().split("VmRSS:")[1].split()[0]) / 1000)


def report(kind: str, images: cache.Cached | cache.OnTheFly, config: ConfigDict) -> None:
    runs = [measure(iterate(images, config), SECONDS.value) for _ in range(REPEATS.value)]
    line = {"images": kind, "shape": images.shape, "batch": config.train.batch_size}
    for name, values in zip(("per_cpu_second", "per_second"), zip(*runs, strict=True), strict=True):
        line[name] = round(statistics.median(values))
        line[f"{name}_spread"] = [round(min(values)), round(max(values))]
    print(json.dumps(line), flush=True)


def main(_: list[str]) -> None:
    config = CONFIG.value
    cached = parts.images(config)
    report("cached", cached, config)
    config.data.cache_limit_gb = 0.0
    report("on the fly", parts.images(config), config)

    batches, memory = iterate(cached, config), []
    for _ in range(3):
        for _ in range(len(cached) // config.train.batch_size):
            next(batches)
        memory.append(resident_mb())
    print(json.dumps({"resident_mb_after_epochs": memory, "cache_mb": round(len(cached) * cached[0].nbytes / 1e6)}))


if __name__ == "__main__":
    app.run(main)
