"""How far samples of the digits model are from the real digits, in pixel space.

    python -m tools.frechet --samples=samples.npz

Fréchet distance between Gaussians fitted to the images as vectors of 64 pixels in
[−1, 1], float64; with its floor, the distance between two halves of the real digits,
and its ceiling, the distance from Gaussian noise to the real digits.
"""

import numpy as np
from absl import app, flags

from diffusion_jax import data, sources

SAMPLES = flags.DEFINE_string("samples", None, "the .npz that --mode=sample wrote", required=True)


def frechet_distance(x, y) -> float:
    """|μ_x − μ_y|² + tr(C_x + C_y − 2 (C_x C_y)^½) of the rows of x and y, float64."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # tr (C_x C_y)^½ = tr (R C_y R)^½ with R = C_x^½, where everything is symmetric and >= 0.
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x + cov_y) - 2 * trace_of_root)


def vectors(x):
    """uint8 [N, H, W, C] -> float64 [N, H·W·C] in [−1, 1]."""
    return x.reshape(len(x), -1).astype(np.float64) / 127.5 - 1


def main(_):
    real = vectors(data.open_images(sources.digits(), image_size=8, channels=1)[:])
    samples = vectors(np.load(SAMPLES.value)["arr_0"])
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(real)
    floor = frechet_distance(shuffled[: len(real) // 2], shuffled[len(real) // 2 :])
    ceiling = frechet_distance(np.clip(rng.standard_normal(real.shape), -1, 1), real)
    distance = frechet_distance(samples, real)
    print(f"{len(samples)} samples against {len(real)} real digits: {distance:.3f}")
    print(f"floor (two halves of the real digits): {floor:.3f}")
    print(f"ceiling (Gaussian noise, clipped to [-1, 1]): {ceiling:.3f}")
    print(f"of the way from floor to ceiling: {(distance - floor) / (ceiling - floor):.1%}")


if __name__ == "__main__":
    app.run(main)
