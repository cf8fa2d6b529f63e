"""Interpolation, progressive generation, variations and inpainting: identities on four rough steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import process, sampling, schedule
from diffusion_jax.pictures import figures

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(1).standard_normal((3, 2, 2, 1)).astype(np.float32)
IMAGES = np.random.default_rng(2).uniform(-1, 1, (3, 2, 2, 1)).astype(np.float32)
CLIPS = pytest.mark.parametrize("clip", [None, (-0.5, 0.75)])


def network(x, t):
    """A stand-in for the network: different at each t and at each pixel, and without any mixing of pixels."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1


@CLIPS
def test_interpolation_is_a_chain_from_the_mixed_latents(rough, clip):
    sigma, t, key, weights = schedule.sigma_beta(rough), 3, KEYS[0], np.array([0.0, 0.25, 1.0], np.float32)
    eps_bar = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (2, 2, 1)))
    mixed = [(1 - w) * IMAGES[0] + w * IMAGES[1] for w in weights]
    x_t = np.stack([rough.alpha_bar[t] * x + rough.beta_bar[t] * eps_bar for x in mixed])
    expected = sampling.reverse_chain(network, rough, sigma, x_t, jnp.stack([key] * 3), start=t, clip=clip)
    actual = figures.interpolate(network, rough, sigma, IMAGES[0], IMAGES[1], t, weights, key, clip)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_interpolation_between_equal_images_is_the_image(rough):
    """Every weight gives the image at t = 1 with a network that predicts the true noise."""
    key = KEYS[1]
    eps_bar = jax.random.normal(jax.random.fold_in(key, 0), (2, 2, 1))
    perfect = lambda x, t: jnp.broadcast_to(eps_bar, x.shape)  # noqa: E731
    actual = figures.interpolate(
        perfect, rough, np.zeros(5), IMAGES[0], IMAGES[0], 1, np.array([0.0, 0.5, 1.0], np.float32), key
    )
    np.testing.assert_allclose(actual, np.stack([IMAGES[0]] * 3), atol=1e-6)


@CLIPS
def test_progressive_predicts_x_0_from_the_chain_cut_at_each_step(rough, clip):
    sigma, at = schedule.sigma_beta(rough), [4, 3, 1, 0]
    *actual, finished = figures.progressive(network, rough, sigma, X, KEYS, at, clip)
    np.testing.assert_array_equal(finished, sampling.reverse_chain(network, rough, sigma, X, KEYS, clip=clip))
    for t, x_0 in zip(at[:-1], actual, strict=True):
        x_t = sampling.reverse_chain(network, rough, sigma, X, KEYS, stop=t, clip=clip)
        expected = process.predict_x_0(rough, x_t, t, network(x_t, np.full(3, t)))
        np.testing.assert_allclose(x_0, expected if clip is None else np.clip(expected, *clip), rtol=1e-5, atol=1e-6)


@CLIPS
def test_variations_share_the_latent_and_differ_in_noise(rough, clip):
    sigma = schedule.sigma_beta(rough)
    actual = figures.variations(network, rough, sigma, X[0], 3, KEYS, clip)
    expected = sampling.reverse_chain(network, rough, sigma, np.stack([X[0]] * 3), KEYS, start=3, clip=clip)
    np.testing.assert_array_equal(actual, expected)
    assert (np.ptp(actual, axis=0) > 0).any()


@CLIPS
def test_inpainting_is_a_loop_over_its_steps(rough, clip):
    sigma = schedule.sigma_beta(rough)
    known = np.array([[True, False], [False, True]])[None, :, :, None]

    def mix_pixels(x, t):  # lets known pixels affect unknown ones
        return network(x, t) + 0.2 * x.mean(axis=(1, 2), keepdims=True)

    x = X
    for t in (4, 3, 2, 1):
        noise = np.asarray(sampling.normal(KEYS, 4 + t, (2, 2, 1)))
        x = np.where(known, rough.alpha_bar[t] * IMAGES + rough.beta_bar[t] * noise, x)
        x = sampling.reverse_chain(mix_pixels, rough, sigma, x, KEYS, start=t, stop=t - 1, clip=clip)
    actual = figures.inpaint(mix_pixels, rough, sigma, IMAGES, known, X, KEYS, clip)
    np.testing.assert_allclose(actual, np.where(known, IMAGES, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.where(known, actual, 0), np.where(known, IMAGES, 0))


def test_inpainting_with_independent_pixels_is_the_plain_chain(rough):
    """A network that mixes no pixels gives the unknown pixels of the plain chain."""
    sigma, known = schedule.sigma_beta(rough), np.arange(4).reshape(1, 2, 2, 1) < 2
    plain = sampling.reverse_chain(network, rough, sigma, X, KEYS)
    images = np.where(known, IMAGES, np.nan)  # unknown values must not be used
    actual = figures.inpaint(network, rough, sigma, images, known, X, KEYS)
    np.testing.assert_allclose(actual, np.where(known, IMAGES, plain), rtol=1e-5, atol=1e-6)


def test_steps_out_of_range_are_rejected(rough):
    sigma, image = schedule.sigma_beta(rough), IMAGES[0]
    for at in ([5], [-1], [1.0], 3):
        with pytest.raises(ValueError, match=r"at=.* must be a vector of integers in 0\.\.4"):
            figures.progressive(network, rough, sigma, X, KEYS, at)
    for t in (5, 1.0, [3]):
        with pytest.raises(ValueError, match=r"t=.* must be an integer in 0\.\.4"):
            figures.interpolate(network, rough, sigma, image, image, t, np.zeros(2, np.float32), KEYS[0])
        with pytest.raises(ValueError, match=r"start=.* must be an integer in 0\.\.4"):
            figures.variations(network, rough, sigma, image, t, KEYS)
