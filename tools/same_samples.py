"""Prints how much image i changes with the number of devices and the batch size, in units of [-1, 1].

    python -m tools.same_samples runs/digits

The script samples the whole chain on 1, 2 and 4 forced CPU devices.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import diffusion_jax

CASES = [(4, 1), (8, 2), (16, 4), (8, 1), (16, 1), (8, 4), (5, 1), (1, 1)]  # (images, devices)


def samples(workdir: str, num: int) -> np.ndarray:
    """Returns `num` samples of the run, float32 [num, H, W, C]."""
    sample_fn, params = diffusion_jax.load(workdir, num)
    return np.asarray(sample_fn(params, jax.random.key(0)))


def main(workdir: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for num, devices in CASES:
            out = Path(folder) / f"{num}-{devices}.npy"
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            command = [sys.executable, "-m", "tools.same_samples", workdir, str(num), str(out)]
            subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, check=True)
            results.append(np.load(out))
    print(f"jax {jax.__version__}, compared with {CASES[0][0]} images on {CASES[0][1]} device:")
    for (num, devices), x in zip(CASES, results, strict=True):
        shared = min(len(x), len(results[0]))
        difference = np.abs(x[:shared] - results[0][:shared]).max()
        print(f"{num:3} images on {devices} device(s), {-(-num // devices)} each: largest difference {difference:.1e}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        np.save(sys.argv[3], samples(sys.argv[1], int(sys.argv[2])))
    else:
        main(sys.argv[1])
