"""Compares the speed of this project's network with diffusers' network of the same architecture and weights.

    python -m benchmarks.peer --torch=/path/to/its/python --config=configs/cifar10.py --batch=16

--torch is the Python of another environment, with torch and diffusers. The script first checks that both networks have
the same outputs. Both sides then run the forward pass, the train step (gradient, clipping, Adam, average of the
parameters) and a step of the chain, in pairs. The script prints a JSON line for each, with the median and the spread
over the pairs of diffusers' time divided by ours: above 1 where this project is faster.
"""

import contextlib
import json
import statistics
import subprocess
import tempfile
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import unet
from benchmarks.unet import BATCH, CALLS, CONFIG, PLATFORM, STEPS
from diffusion_jax import parts
from diffusion_jax.interop import diffusers
from diffusion_jax.running import hosts

TORCH = flags.DEFINE_string("torch", None, "Python of an environment with torch and diffusers", required=True)
PAIRS = flags.DEFINE_integer("pairs", 5, "pairs of measurements")
COMPILE = flags.DEFINE_bool("compile", False, "use torch.compile, as on a GPU")


class Peer:
    """A process of `peer_torch.py`, which runs one benchmark at a time and reports its seconds."""

    def __init__(self, folder: str, config: ConfigDict) -> None:
        script = Path(__file__).with_name("peer_torch.py")
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        numbers = [str(BATCH.value), str(STEPS.value), str(CALLS.value)]
        options = [str(folder), device, config.model.dtype, *numbers, str(COMPILE.value)]
        self._process = subprocess.Popen(
            [TORCH.value, str(script), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._read_line()

    def _read_line(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the process of --torch={TORCH.value} has ended: read its output above")
        return json.loads(line)

    def seconds(self, name: str) -> float:
        """Runs the benchmark `name`, and returns the seconds per step."""
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self._read_line()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait(60)


def write_model(config: ConfigDict, params: Any, folder: Path) -> None:
    """Writes the parameters as a folder of diffusers, and the network's outputs for some images as example.npz."""
    diffusers.write_unet(config, params, folder / "unet")
    x = np.random.default_rng(0).standard_normal((2, *parts.image_shape(config))).astype(np.float32)
    t = np.array([1, config.schedule.num_steps])
    y = jax.jit(parts.network(config))({"params": params}, x, t)
    np.savez(folder / "example.npz", x=x, t=t, y=y)


def random_weights(params: Any) -> Any:
    """Replaces the kernels, of which some are nearly zero at initialization, so that every branch counts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (rng.standard_normal(x.shape) * 0.05).astype(x.dtype) if x.ndim > 1 else x, params)


def main(_: list[str]) -> None:
    hosts.initialize(PLATFORM.value)
    config = CONFIG.value
    if jax.device_count() > 1:
        raise SystemExit(f"error: JAX found {jax.device_count()} devices: leave it one, e.g. CUDA_VISIBLE_DEVICES=0")
    with tempfile.TemporaryDirectory() as folder:
        write_model(config, random_weights(parts.build(config).init_state().params), Path(folder))
        with contextlib.closing(Peer(folder, config)) as peer, futures.ThreadPoolExecutor(1) as pool:
            warm = pool.submit(lambda: [peer.seconds(name) for name in unet.NAMES])  # torch compiles while JAX does
            ours = unet.runs(config, BATCH.value, STEPS.value)
            warm.result()
            times = {name: [] for name in ours}
            for _ in range(PAIRS.value):
                for name, run in ours.items():
                    times[name].append((run.seconds(CALLS.value), peer.seconds(name)))
            about = peer.about
    for name, pairs in times.items():
        our_times, their_times = np.array(pairs).T
        ratios = their_times / our_times
        line = {"run": name, "theirs_to_ours": round(float(np.median(ratios)), 3)}
        line |= {"spread": [round(float(f(ratios)), 3) for f in (min, max)], "pairs": len(pairs)}
        line |= {"ms": round(1e3 * statistics.median(our_times), 2)}
        line |= {"their_ms": round(1e3 * statistics.median(their_times), 2)}
        line |= {"batch": BATCH.value, "dtype": config.model.dtype, "device": jax.devices()[0].device_kind}
        print(json.dumps(line | {"jax": jax.__version__} | about), flush=True)


if __name__ == "__main__":
    app.run(main)
