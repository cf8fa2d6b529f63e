"""The measurements that training makes at intervals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Examples, tiny_config
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


def test_nearest_pairs_of_an_array():
    """Each sample lies above its image, with a row for each channel; the images are float32 in [−1, 1]."""
    generated = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 2), np.uint8)
    train = pixels.from_uint8(np.flip(generated, 0))
    picture = monitor.nearest_pairs(generated, train, np.array([2, 1, 0]), np.arange(3.0), has_alpha=False)
    for row in (0, 1):
        sheet = picture[-2 * 2 * 68 + row * 68 :, -3 * 68 :][:64, :64, 0]
        np.testing.assert_array_equal(sheet, generated[0, ..., row])
        below = picture[-2 * 68 + row * 68 :, -3 * 68 :][:64, :64, 0]
        np.testing.assert_array_equal(below, generated[0, ..., row])


class WithLabels(Examples):
    array_dtype = ""
    classes = ("a", "b", "c")
    shape = (20, 8, 8, 1)

    def __getitem__(self, indices):
        return self.arrays["image"][indices]


@pytest.mark.slow
def test_a_run_with_classes_is_measured_with_labels(tmp_path):
    """The network here knows the grey level of each class: with the right labels, the loss is 0 and samples are exact.

    ε̄ = (x − ᾱ level) / β̄ is then the noise itself.
    """
    config = tiny_config(model__num_classes=3, sampling__num=100, schedule__num_steps=20)
    run, levels = parts.build(config), np.array([51, 102, 204], np.uint8)

    def network(variables, x, t, labels=None):
        labels = np.zeros(len(x), int) if labels is None else labels
        level = pixels.from_uint8(jnp.asarray(levels))[labels][:, None, None, None]
        alpha, beta = (a[t][:, None, None, None] for a in (run.schedule.alpha_bar, run.schedule.beta_bar))
        return (x - alpha * level) / beta

    labels = np.arange(20) % 3
    images = WithLabels(np.broadcast_to(levels[labels][:, None, None, None], (20, 8, 8, 1)), labels)
    measure = monitor.Monitor(dataclasses.replace(run, network=network), images, images)
    values = measure({"a": np.ones(1)}, 3, epath.Path(tmp_path))
    assert values["held_out_loss"] == pytest.approx(0, abs=1e-6)
    generated = measure._generated({"a": np.ones(1)})
    np.testing.assert_array_equal(generated[:, 0, 0, 0], levels[np.arange(monitor.SAMPLES) % 3])
    other = WithLabels(images.arrays["image"], labels)
    other.classes = ("a", "c")
    with pytest.raises(UserError, match=r"data\.test_split has other classes than data\.split"):
        monitor.Monitor(run, images, other)


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
