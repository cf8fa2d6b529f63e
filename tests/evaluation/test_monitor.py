"""What training looks at every so often."""

import jax
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath

from diffusion_jax import parts
from diffusion_jax.data import pixels
from diffusion_jax.evaluation import metrics, monitor, quality


def test_samples_are_compared_with_held_out_images_and_searched_for_among_training_images(tmp_path):
    config = tiny_config(data__split="train[:100]", data__test_split="train[100:130]")
    train = parts.images(config)
    look, params = monitor.Monitor(config, train), parts.build(config).init_state().ema_params
    found = look(params, 3, epath.Path(tmp_path), True)
    x = quality.pixels(pixels.to_uint8(look._sample(params, jax.random.key(config.seed))))
    config.data.split = config.data.test_split
    y = quality.pixels(train[:])
    assert len(x) == monitor.SAMPLES
    held_out = quality.pixels(parts.images(config)[:])
    assert found["frechet_pixels"] == pytest.approx(metrics.frechet_of_features(x, held_out), rel=1e-6)
    nearest = [np.linalg.norm(y - row, axis=1).min() for row in x]
    assert found["nearest_training_image"] == pytest.approx(np.median(nearest), rel=1e-5)
