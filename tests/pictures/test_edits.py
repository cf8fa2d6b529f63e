"""RePaint, SDEdit and DDIM inversion: identities on four rough steps, Gaussian data in closed form."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion_jax import process, sampling, schedule
from diffusion_jax.pictures import edits, figures

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(1).standard_normal((3, 2, 2, 1)).astype(np.float32)
IMAGES = np.random.default_rng(2).uniform(-1, 1, (3, 2, 2, 1)).astype(np.float32)
KNOWN = np.array([[True, False], [False, True]])[None, :, :, None]
CLIPS = pytest.mark.parametrize("clip", [None, (-0.5, 0.75)])


def network(x, t):
    """A stand-in for the network: different at each t and at each pixel; known pixels affect unknown ones."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1 + 0.2 * x.mean(axis=(1, 2), keepdims=True)


def optimal(s, mean, covariance):
    """ε̄ = β̄_t V_t⁻¹ (x − ᾱ_t m) with V_t = ᾱ_t² C + β̄_t², for data N(m, C). x is [B, d]."""
    a, b = (np.asarray(array, np.float64) for array in (s.alpha_bar, s.beta_bar))
    a, b = a[:, None, None], b[:, None, None]
    factor = jnp.asarray(b * np.linalg.inv(a**2 * covariance + b**2 * np.eye(len(mean))), jnp.float32)
    return lambda x, t: jnp.einsum("bij,bj->bi", factor[t], x - s.alpha_bar[t][:, None] * mean[None])


# ---------------------------------------------------------------- RePaint


def test_times_of_a_small_case_by_hand():
    np.testing.assert_array_equal(edits.repaint_times(4, 1, 1), [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(edits.repaint_times(4, 1, 2), [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0])
    np.testing.assert_array_equal(edits.repaint_times(3, 1, 3), [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0])
    np.testing.assert_array_equal(edits.repaint_times(6, 2, 2), [6, 5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0])
    np.testing.assert_array_equal(edits.repaint_times(5, 2, 2), [5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0])
    np.testing.assert_array_equal(edits.repaint_times(1, 1, 5), [1, 0])


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [2, 3, 7, 20])
def test_a_jump_of_one_is_algorithm_1(num_steps, repeats):
    """For t = T..1 and u = 1..U: a reverse step, and then a step forward if u < U and t > 1."""
    times = [num_steps]
    for t in range(num_steps, 0, -1):
        for u in range(1, repeats + 1):
            times.append(t - 1)
            if u < repeats and t > 1:
                times.append(t)
            elif t == 1:
                break  # x_0 is not noised again, so its step is done once
    np.testing.assert_array_equal(edits.repaint_times(num_steps, 1, repeats), times)


@pytest.mark.parametrize("num_steps, jump, repeats", [(250, 10, 10), (20, 7, 3), (20, 19, 2), (9, 3, 4)])
def test_every_step_of_a_block_is_repeated(num_steps, jump, repeats):
    times = edits.repaint_times(num_steps, jump, repeats)
    assert times.dtype == np.int32 and times[0] == num_steps and times[-1] == 0
    assert (abs(np.diff(times)) == 1).all()
    visits = collections.Counter(times[:-1][np.diff(times) < 0].tolist())
    top = 1 + (num_steps - 1) // jump * jump  # blocks of `jump` steps lie above 1
    assert visits == {t: repeats if 1 < t <= top else 1 for t in range(1, num_steps + 1)}


@pytest.mark.parametrize("change", [{"jump": 0}, {"jump": 4}, {"repeats": 0}, {"repeats": 1.5}, {"num_steps": 0}])
def test_times_out_of_range_are_rejected(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}=.* must be an integer"):
        edits.repaint_times(**({"num_steps": 4, "jump": 1, "repeats": 1} | change))


@CLIPS
def test_one_repeat_is_inpainting_bit_for_bit(rough, clip):
    """Inpainting without any way up, as a scan of its own."""
    sigma = schedule.sigma_beta(rough)

    def step(x, t):
        noise = sampling.normal(KEYS, 4 + t, x.shape[1:])
        x = jnp.where(KNOWN, process.forward(rough, IMAGES, t, noise), x)
        return sampling.ancestral_step(network, rough, sigma, x, KEYS, t, clip)[0], None

    x, _ = lax.scan(step, X, jnp.arange(4, 0, -1, dtype=jnp.int32))
    expected = np.where(KNOWN, IMAGES, x)
    for jump in (1, 2, 3):
        actual = edits.repaint(network, rough, sigma, IMAGES, KNOWN, X, KEYS, clip, jump, repeats=1)
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(figures.inpaint(network, rough, sigma, IMAGES, KNOWN, X, KEYS, clip), expected)


@CLIPS
@pytest.mark.parametrize("jump, moves", [(1, [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0]), (2, [4, 3, 2, 1, 3, 2, 1, 0])])
def test_repaint_is_a_loop_over_its_moves(rough, clip, jump, moves):
    """Visit r of step t has a key of its own; the way up is one draw of q(x_t | x_u)."""
    sigma, visits, x = schedule.sigma_beta(rough), collections.Counter(), X
    a, b = (np.asarray(array, np.float64) for array in (rough.alpha_bar, rough.beta_bar))
    keys = lambda r: jax.vmap(lambda key: jax.random.fold_in(key, 8 + r))(KEYS) if r else KEYS  # noqa: E731
    for t, u in itertools.pairwise(moves):
        if u > t:
            noise = sampling.normal(keys(visits[u]), 8 + u, (2, 2, 1))
            x = a[u] / a[t] * x + np.sqrt(1 - (a[u] / a[t]) ** 2) * noise
            continue
        own = keys(visits[t])
        x = np.where(KNOWN, a[t] * IMAGES + b[t] * sampling.normal(own, 4 + t, (2, 2, 1)), x)
        x = sampling.reverse_chain(network, rough, sigma, x.astype(np.float32), own, start=t, stop=t - 1, clip=clip)
        visits[t] += 1
    images = np.where(KNOWN, IMAGES, np.nan)  # unknown values must not be used
    actual = edits.repaint(network, rough, sigma, images, KNOWN, X, KEYS, clip, jump, repeats=2)
    np.testing.assert_allclose(actual, np.where(KNOWN, IMAGES, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.where(KNOWN, actual, 0), np.where(KNOWN, IMAGES, 0))


def test_an_example_depends_on_its_own_key_alone(rough):
    sigma = schedule.sigma_beta(rough)
    whole = edits.repaint(network, rough, sigma, IMAGES, KNOWN, X, KEYS, jump=1, repeats=3)
    alone = edits.repaint(network, rough, sigma, IMAGES[1:2], KNOWN, X[1:2], KEYS[1:2], jump=1, repeats=3)
    np.testing.assert_allclose(whole[1:2], alone, rtol=1e-5, atol=1e-6)


def propagated(s, sigma, mean, covariance, known, x_0, times):
    """Returns the exact mean and covariance of x_0, as each move of the chain is affine on Gaussian data."""
    alpha, beta, a, b, sigma = (np.asarray(array, np.float64) for array in (*s, sigma))
    one = np.eye(len(mean))
    keep, drop = np.diag(known * 1.0), np.diag(~known * 1.0)
    m, v = np.zeros(len(mean)), one
    for t, u in itertools.pairwise(times):
        if u > t:
            m, v = alpha[u] * m, alpha[u] ** 2 * v + beta[u] ** 2 * one
            continue
        m, v = drop @ m + keep @ (a[t] * x_0), drop @ v @ drop + b[t] ** 2 * keep
        score = np.linalg.inv(a[t] ** 2 * covariance + b[t] ** 2 * one)
        gain = (one - beta[t] ** 2 * score) / alpha[t]
        m = gain @ m + beta[t] ** 2 / alpha[t] * score @ (a[t] * mean)
        v = gain @ v @ gain.T + (sigma[t] ** 2 if t > 1 else 0.0) * one
    return m[~known], v[np.ix_(~known, ~known)]


@pytest.mark.slow
def test_repaint_approaches_the_conditional_moments():
    """One chain is biased; the bias falls with the repeats. 4,000 samples agree with exactly propagated moments."""
    s, num = schedule.cosine(50), 4000
    sigma = schedule.sigma_beta(s)
    mean = np.array([0.3, -0.2, 0.1])
    covariance = 0.5 * np.array([[1.0, 0.9, 0.5], [0.9, 1.0, 0.7], [0.5, 0.7, 1.0]])
    known, x_0 = np.array([True, False, False]), np.array([1.2, 0.0, 0.0])
    weights = covariance[1:, :1] / covariance[0, 0]
    exact_mean = mean[1:] + weights[:, 0] * (x_0 - mean)[0]
    exact_covariance = covariance[1:, 1:] - weights @ covariance[:1, 1:]

    keys = jax.random.split(jax.random.key(3), num)
    images = np.broadcast_to(x_0.astype(np.float32), (num, 3))
    network, latents = optimal(s, mean.astype(np.float32), covariance), sampling.normal(keys, 0, (3,))
    errors = {}
    for repeats in (1, 20):
        paint = lambda x, keys, repeats=repeats: edits.repaint(  # noqa: E731
            network, s, sigma, images, known[None], x, keys, jump=2, repeats=repeats
        )
        samples = np.asarray(jax.jit(paint)(latents, keys), np.float64)[:, 1:]
        m, v = propagated(s, sigma, mean, covariance, known, x_0, edits.repaint_times(50, 2, repeats))
        noise = np.sqrt(np.diag(v) / num)  # of the mean; of the variance it is √(2/num) v
        assert (abs(samples.mean(0) - m) < 4.5 * noise).all()
        spread = np.sqrt((v**2 + np.outer(np.diag(v), np.diag(v))) / num)
        assert (abs(np.cov(samples.T) - v) < 4.5 * spread).all()
        errors[repeats] = abs(samples.mean(0) - exact_mean).max(), abs(np.cov(samples.T) - exact_covariance).max()
    assert (np.divide(errors[1], errors[20]) > 5).all(), errors


# ---------------------------------------------------------------- the boundary


def test_boundary_error_is_the_mean_jump_across_the_edge():
    ramp = np.arange(12.0).reshape(1, 3, 4, 1) ** 2 * np.array([1.0, -2.0])  # two channels
    lower = (np.arange(3) >= 1)[None, :, None, None]
    np.testing.assert_allclose(
        edits.boundary_error(ramp, ~lower), [np.mean(1.5 * (np.arange(4, 8) ** 2 - np.arange(4) ** 2))]
    )
    corner = np.zeros((1, 3, 4, 1), bool)
    corner[0, 0, 0] = True  # two neighbours: 1 and 4
    np.testing.assert_allclose(edits.boundary_error(ramp, corner), [1.5 * (1 + 16) / 2])
    np.testing.assert_array_equal(edits.boundary_error(ramp, corner), edits.boundary_error(ramp, ~corner))


def test_boundary_error_is_one_number_for_each_image():
    images = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1))
    masks = np.random.default_rng(1).uniform(size=(3, 4, 4, 1)) < 0.5
    masks[2] = True
    errors = edits.boundary_error(images, masks)
    assert errors.shape == (3,) and np.isnan(errors[2])
    for i in range(2):
        np.testing.assert_array_equal(edits.boundary_error(images[i : i + 1], masks[i]), errors[i : i + 1])


# ---------------------------------------------------------------- SDEdit


@CLIPS
def test_sdedit_is_a_chain_from_the_noised_image(rough, clip):
    sigma = schedule.sigma_beta(rough)
    for t in (1, 3, 4):
        x_t = rough.alpha_bar[t] * IMAGES + rough.beta_bar[t] * sampling.normal(KEYS, 0, (2, 2, 1))
        expected = sampling.reverse_chain(network, rough, sigma, x_t, KEYS, start=t, clip=clip)
        actual = edits.sdedit(network, rough, sigma, IMAGES, KEYS, t, clip)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(edits.sdedit(network, rough, sigma, IMAGES, KEYS, 0, clip), IMAGES)
    for t in (-1, 5, 1.0):
        with pytest.raises(ValueError, match=r"t=.* must be an integer in 0\.\.4"):
            edits.sdedit(network, rough, sigma, IMAGES, KEYS, t)


def test_sdedit_has_the_moments_of_gaussian_data():
    """m + gain_t ᾱ_t (x_0 − m), and gain_t² β̄_t² + Σ_{2<=k<=t} (gain_{k−1} σ_k)², gain_t = ᾱ_t s² / v_t."""
    s, mean, deviation, num = schedule.cosine(40), 0.3, 0.5, 10000
    sigma = schedule.sigma_beta(s)
    a, b = (np.asarray(array, np.float64) for array in (s.alpha_bar, s.beta_bar))
    gain = a * deviation**2 / (a**2 * deviation**2 + b**2)
    network = optimal(s, np.array([mean], np.float32), np.array([[deviation**2]]))
    keys, pictures, means = jax.random.split(jax.random.key(5), num), (-1.0, 1.5), {}
    x_0 = np.repeat(np.float32(pictures), num)[:, None]
    for t in (1, 25, 40):
        both = edits.sdedit(network, s, sigma, x_0, jnp.concatenate([keys, keys]), t)
        for picture, samples in zip(pictures, np.asarray(both, np.float64).reshape(2, num), strict=True):
            variance = gain[t] ** 2 * b[t] ** 2 + sum((gain[k - 1] * float(sigma[k])) ** 2 for k in range(2, t + 1))
            expected = mean + gain[t] * a[t] * (picture - mean)
            assert abs(samples.mean() - expected) < 4.5 * np.sqrt(variance / num)
            assert samples.var() == pytest.approx(variance, rel=4.5 * np.sqrt(2 / num))
            means[picture, t] = samples.mean()
    assert abs(means[1.5, 40] - means[-1.0, 40]) < 1e-3  # the same noise, and nothing is left of the picture
    assert abs(means[1.5, 1] - 1.5) < 0.02 and abs(means[-1.0, 1] + 1) < 0.02


# ---------------------------------------------------------------- DDIM inversion


def test_inversion_is_a_loop_over_its_formula(rough):
    x = IMAGES.astype(np.float64)
    a, b = (np.asarray(array, np.float64) for array in (rough.alpha_bar, rough.beta_bar))
    for u, t in ((0, 1), (1, 3), (3, 4)):
        eps_bar = np.asarray(network(jnp.asarray(x, jnp.float32), np.full(3, max(u, 1))), np.float64)
        x = a[t] * (x - b[u] * eps_bar) / a[u] + b[t] * eps_bar
    for invert in (edits.invert, jax.jit(edits.invert, static_argnums=0)):
        np.testing.assert_allclose(invert(network, rough, [4, 3, 1, 0], IMAGES), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ts", [[0, 4], [3], [4, 4, 0], [5, 0], [4, -1], [4.0, 0.0]])
def test_a_grid_that_does_not_fall_is_rejected(rough, ts):
    with pytest.raises(ValueError, match="ts="):
        edits.invert(network, rough, ts, IMAGES)


def test_inversion_and_reconstruction_converge_with_order_1():
    """The exact latent of Gaussian data is m + √(v_t/v_u) (x − m) along each eigenvector of the covariance."""
    s, keys = schedule.ho_linear(1024), KEYS
    mean, covariance = np.array([0.3, -0.2], np.float32), 0.5 * np.array([[1.0, 0.9], [0.9, 1.0]])
    variances, vectors = np.linalg.eigh(covariance)
    network, x = optimal(s, mean, covariance), IMAGES.reshape(3, -1)[:, :2]
    a, b = float(s.alpha_bar[-1]), float(s.beta_bar[-1])
    stretched = (x - mean) @ vectors * np.sqrt((a**2 * variances + b**2) / variances)
    exact, errors = a * mean + stretched @ vectors.T, []
    for n in (128, 256):
        ts = sampling.grid_uniform(s, n)
        latent = edits.invert(network, s, ts, x)
        back = sampling.ddim_chain(network, s, ts, latent, keys)
        errors.append([abs(np.asarray(latent) - exact).max(), abs(np.asarray(back) - x).max()])
    slopes = np.log2(np.array(errors)[:-1] / np.array(errors)[1:])
    np.testing.assert_allclose(slopes, [[1, 1]], atol=0.2, err_msg=str(errors))
