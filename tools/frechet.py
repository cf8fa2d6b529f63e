"""How far samples of the digits model are from the real digits, in pixel space.

    python -m tools.frechet --samples=samples.npz

Fréchet distance between Gaussians fitted to the images as vectors of 64 pixels in
[−1, 1], float64; with its floor, the distance between two halves of the real digits,
and its ceiling, the distance from Gaussian noise to the real digits.
"""

import numpy as np
from absl import app, flags

from diffusion_jax.data import cache
from diffusion_jax.data.digits import digits
from diffusion_jax.evaluation import metrics, quality

SAMPLES = flags.DEFINE_string("samples", None, "the .npz that --mode=sample wrote", required=True)


def main(_: list[str]) -> None:
    real = quality.pixels(cache.open_images(digits(), image_size=8, channels=1)[:])
    samples = quality.pixels(quality.read_samples(SAMPLES.value))
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(real)
    floor = metrics.frechet_of_features(shuffled[: len(real) // 2], shuffled[len(real) // 2 :])
    ceiling = metrics.frechet_of_features(np.clip(rng.standard_normal(real.shape), -1, 1), real)
    distance = metrics.frechet_of_features(samples, real)
    print(f"{len(samples)} samples against {len(real)} real digits: {distance:.3f}")
    print(f"floor (two halves of the real digits): {floor:.3f}")
    print(f"ceiling (Gaussian noise, clipped to [-1, 1]): {ceiling:.3f}")
    print(f"of the way from floor to ceiling: {(distance - floor) / (ceiling - floor):.1%}")


if __name__ == "__main__":
    app.run(main)
