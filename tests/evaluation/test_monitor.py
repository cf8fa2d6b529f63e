"""The measurements that training makes at intervals."""

import jax
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath

from diffusion_jax import parts
from diffusion_jax.data import pixels
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import metrics, monitor, quality


def test_a_single_image_is_refused():
    run, one, two = parts.build(tiny_config()), np.zeros((1, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match=r"not 1: give a larger data\.test_split, or train\.evaluate_every=0"):
        monitor.Monitor(run, two, one)
    with pytest.raises(UserError, match=r"not 1: give a larger data\.split,"):
        monitor.Monitor(run, one)


@pytest.mark.slow
def test_distances_of_samples_to_held_out_and_training_images(tmp_path):
    """Drawn in calls of the size of a grid: 100, 100 and 56."""
    splits = {"data__split": "train[:100]", "data__test_split": "train[100:130]"}
    config = tiny_config(**splits, sampling__num=100, sampling__sampler="dpmpp_2m", sampling__steps=monitor.STEPS)
    run, train, held_out = parts.build(config), parts.images(config), parts.images(config, config.data.test_split)
    measure, params = monitor.Monitor(run, train, held_out), run.init_state().ema_params
    values = measure(params, 3, epath.Path(tmp_path))
    x = quality.pixels(pixels.to_uint8(run.sample_fn(monitor.SAMPLES)(params, jax.random.key(config.seed))))
    y, held_out = quality.pixels(train[:]), quality.pixels(held_out[:])
    assert len(x) == monitor.SAMPLES
    assert values["frechet_pixels"] == pytest.approx(metrics.frechet_of_features(x, held_out), rel=1e-3)
    nearest = [np.linalg.norm(y - row, axis=1).min() for row in x]
    assert values["nearest_training_image"] == pytest.approx(np.median(nearest), rel=1e-3)
