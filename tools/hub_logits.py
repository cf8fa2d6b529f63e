"""Compares an imported model of the hub with the outputs that diffusers publishes for it.

    python main.py --mode=import --from=google/ddpm-cifar10-32 --workdir=runs/hub
    python -m tools.hub_logits --workdir=runs/hub --model=google/ddpm-cifar10-32

The script needs torch, because the published outputs belong to torch's random noise of seed 0, at diffusers' step
10, which is t = 11. They are 30 values of the first row; diffusers' scripts/generate_logits.py tolerates 1e-3. The
comparison has not been run with a hub model yet; the tests use another network.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

import diffusion_jax

# From diffusers, scripts/generate_logits.py.
PUBLISHED = {
    "google/ddpm-cifar10-32": (
        *(-0.7515, -1.6883, 0.2420, 0.0300, 0.6347, 1.3433, -1.1743, -3.7467, 1.2342, -2.2485),
        *(0.4636, 0.8076, -0.7991, 0.3969, 0.8498, 0.9189, -1.8887, -3.3522, 0.7639, 0.2040),
        *(0.6271, -2.7148, -1.6316, 3.0839, 0.3186, 0.2721, -0.9759, -1.2461, 2.6257, 1.3557),
    ),
    "google/ddpm-celebahq-256": (
        *(-1.3690, -1.9720, -0.4090, -0.6966, 1.4660, 0.9938, -0.1385, -2.7324, 0.7736, -1.8917),
        *(0.2923, 0.4293, 0.1693, 1.4112, 1.1887, -0.3181, -2.2160, -2.6381, 1.3170, 0.8163),
        *(0.9240, -1.6544, -0.6099, 2.5259, 1.6430, -0.9090, -0.9392, -0.0126, 2.4268, 2.3266),
    ),
    "google/ddpm-church-256": (
        *(-2.0585, -2.7897, -0.2850, -0.8940, 1.9052, 0.5702, 0.6345, -3.8959, 1.5932, -3.2319),
        *(0.1974, 0.0287, 1.7566, 2.6543, 0.8387, -0.5351, -3.2736, -4.3375, 2.9029, 1.6390),
        *(1.4640, -2.1701, -1.9013, 2.9341, 3.4981, -0.6255, -1.1644, -0.1591, 3.7097, 3.2066),
    ),
    "google/ddpm-bedroom-256": (
        *(-2.3139, -2.5594, -0.0197, -0.6785, 1.7001, 1.1606, 0.3075, -2.1740, 1.8071, -2.5630),
        *(-0.0926, -0.3811, 1.2116, 2.6246, 1.2731, -0.5398, -2.8153, -3.6140, 2.3893, 1.3262),
        *(1.6258, -2.1856, -1.3267, 2.8395, 2.3779, -1.0623, -1.2468, 0.8959, 3.3367, 3.2243),
    ),
}


def difference(
    apply_fn: Callable[..., jax.Array], params: Any, noise: ArrayLike, published: tuple[float, ...]
) -> float:
    """Returns the largest difference between the network's first row at t = 11 and the published values.

    Args:
      apply_fn: apply_fn({"params": params}, x [B, H, W, C], t [B]) -> eps_bar.
      params: of the network.
      noise: x in torch's layout [1, C, H, W].
      published: the first values of the first row.
    """
    x = np.asarray(noise, np.float32).transpose(0, 2, 3, 1)
    output = jax.jit(apply_fn)({"params": params}, x, np.full(1, 11))
    return float(abs(np.asarray(output)[0, 0, : len(published), 0] - np.array(published)).max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True, help="the workdir of --mode=import")
    parser.add_argument("--model", required=True, choices=PUBLISHED, help="the published name of the model")
    args = parser.parse_args()
    import torch

    apply_fn, params, _ = diffusion_jax.load_network(args.workdir)
    size = int(args.model.split("-")[-1])
    torch.manual_seed(0)
    largest = difference(apply_fn, params, torch.randn(1, 3, size, size).numpy(), PUBLISHED[args.model])
    print(f"{args.model}: largest difference from the published outputs {largest:.1e}")
    sys.exit(largest > 1e-3)


if __name__ == "__main__":
    main()
