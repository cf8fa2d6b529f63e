"""Prints the Fréchet distance between samples of the digits model and the real digits, in pixel space.

    python -m tools.frechet --samples=samples.npz

The images are vectors of 64 pixels in [−1, 1], and the distance is that of Gaussians fitted to them, in float64.
The script also prints its floor, the distance between two halves of the real digits, and its ceiling, the
distance from Gaussian noise to the real digits.
"""

import numpy as np
from absl import app, flags

from diffusion_jax.data import cache, sources
from diffusion_jax.evaluation import metrics, quality

SAMPLES = flags.DEFINE_string("samples", None, "the .npz file that --mode=sample has written", required=True)


def main(_: list[str]) -> None:
    real = quality.pixels(cache.open_images(sources.digits(), image_size=8, channels=1)[:])
    samples = quality.pixels(quality.read_samples(SAMPLES.value))
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(real)
    floor = metrics.frechet_of_features(shuffled[: len(real) // 2], shuffled[len(real) // 2 :])
    ceiling = metrics.frechet_of_features(np.clip(rng.standard_normal(real.shape), -1, 1), real)
    distance = metrics.frechet_of_features(samples, real)
    print(f"{len(samples)} samples against {len(real)} real digits: {distance:.3f}")
    print(f"floor (two halves of the real digits): {floor:.3f}")
    print(f"ceiling (Gaussian noise, clipped to [-1, 1]): {ceiling:.3f}")
    print(f"position between floor and ceiling: {(distance - floor) / (ceiling - floor):.1%}")


if __name__ == "__main__":
    app.run(main)
