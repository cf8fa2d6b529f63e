"""Exact identities in coordinates. x_0 and the noises ε_1..ε_T are an orthonormal
basis, so a random variable is the vector of its coefficients and a covariance is a
dot product."""

import jax
import numpy as np
import pytest

from diffusion_jax import process, schedule

STEPS = range(1, 5)
X_0, EPS = np.eye(5)[0], np.eye(5)  # EPS[t] is ε_t, orthogonal to X_0
close = pytest.approx


def walk(s):
    """Returns [x_0, ..., x_T] by repeated (3)."""
    xs = [X_0]
    for t in STEPS:
        xs.append(np.asarray(process.forward_step(s, xs[-1], t, EPS[t])))
    return xs


def test_repeated_steps_are_the_forward_process(rough):
    """t times (3) is (6): x_0 has the coefficient ᾱ_t, the noise has norm β̄_t."""
    for t, x_t in enumerate(walk(rough)):
        signal, noise = np.asarray(process.forward(rough, np.eye(2)[0], t, np.eye(2)[1]))
        assert x_t[0] == close(signal, rel=1e-6)
        assert np.linalg.norm(x_t[1:]) == close(noise, rel=1e-6)


def test_forward_at_0_is_the_data(rough):
    np.testing.assert_array_equal(process.forward(rough, X_0, 0, EPS[1]), X_0)


def test_step_noise_is_the_conditional_expectation(rough):
    """(12): E[ε_t | ε̄_t] = <ε_t, ε̄_t> ε̄_t, where both have unit variance."""
    for t, x_t in enumerate(walk(rough)):
        if t == 0:
            continue
        eps_bar = np.asarray(process.predict_eps_bar(rough, x_t, t, X_0))
        assert np.linalg.norm(eps_bar) == close(1, rel=1e-6)
        assert float(process.step_noise(rough, 1.0, t)) == close(eps_bar @ EPS[t], rel=1e-6)


def test_reverse_step_inverts_forward_step(rough):
    """(8) with the noise that (3) added."""
    xs = walk(rough)
    for t in STEPS:
        np.testing.assert_allclose(process.reverse_step(rough, xs[t], t, EPS[t]), xs[t - 1], atol=1e-6)


def test_reverse_step_adds_its_noise(rough):
    """(17): the noise is added to the mean (16)."""
    mean = process.reverse_step(rough, X_0, 3, EPS[3])
    np.testing.assert_allclose(process.reverse_step(rough, X_0, 3, EPS[3], 0.25 * EPS[4]), mean + 0.25 * EPS[4])


def test_predictions_invert_forward(rough):
    for t in STEPS:
        x_t = process.forward(rough, X_0, t, EPS[1])
        np.testing.assert_allclose(process.predict_x_0(rough, x_t, t, EPS[1]), X_0, atol=1e-6)
        np.testing.assert_allclose(process.predict_eps_bar(rough, x_t, t, X_0), EPS[1], atol=1e-6)


def test_posterior_mean_is_gaussian_conditioning(rough):
    """E[x_{t−1} | x_t, x_0] = ᾱ_{t−1} x_0 + cov/var · (x_t − ᾱ_t x_0), with cov and var from coordinates."""
    xs = walk(rough)
    for t in STEPS:
        noise_prev, noise = xs[t - 1][1:], xs[t][1:]
        gain = noise_prev @ noise / (noise @ noise)
        x_0, x_t = 0.7, -1.3
        expected = xs[t - 1][0] * x_0 + gain * (x_t - xs[t][0] * x_0)
        assert float(process.posterior_mean(rough, x_0, x_t, t)) == close(expected, rel=1e-5)


def test_posterior_mean_of_the_predicted_x_0_is_the_reverse_step(rough):
    for t in STEPS:
        x_t, eps_bar = np.array([0.3, -2.0, 1.1]), np.array([1.0, 0.5, -0.2])
        x_0 = process.predict_x_0(rough, x_t, t, eps_bar)
        expected = process.reverse_step(rough, x_t, t, process.step_noise(rough, eps_bar, t))
        np.testing.assert_allclose(process.posterior_mean(rough, x_0, x_t, t), expected, rtol=2e-6, atol=2e-6)


def test_velocity_is_inverted(rough):
    rng = np.random.default_rng(0)
    x_0, eps_bar = rng.standard_normal((2, 5)).astype(np.float32)
    for t in (1, 2, 3, 4):
        x_t, v = process.forward(rough, x_0, t, eps_bar), process.velocity(rough, x_0, t, eps_bar)
        np.testing.assert_allclose(process.predict_eps_bar_from_velocity(rough, x_t, t, v), eps_bar, atol=1e-6)
        np.testing.assert_allclose(rough.alpha_bar[t] * x_t - rough.beta_bar[t] * v, x_0, atol=1e-6)


def test_variance_between():
    s = schedule.ho_linear(1000)
    for t in (1, 2, 10, 300, 1000):
        assert process.variance_between(s, t, t - 1) == pytest.approx(float(s.beta[t]) ** 2, rel=1e-4)
    beta_squared = np.linspace(1e-4, 0.02, 1000)
    exact = 1 - np.prod(1 - beta_squared[100:300])
    assert process.variance_between(s, 300, 100) == pytest.approx(exact, rel=1e-5)
    assert process.variance_between(s, 1000, 0) == pytest.approx(1 - np.prod(1 - beta_squared), rel=1e-5)


def test_vmap_over_t_equals_a_loop(rough):
    t = np.array([4, 1, 3])
    x, eps = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    batch = jax.vmap(process.reverse_step, (None, 0, 0, 0))(rough, x, t, eps)
    for i in range(3):
        np.testing.assert_allclose(batch[i], process.reverse_step(rough, x[i], t[i], eps[i]), rtol=1e-6)


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, t: process.forward_step(s, X_0, t, EPS[1]),
        lambda s, t: process.forward(s, X_0, t, EPS[1]),
        lambda s, t: process.step_noise(s, EPS[1], t),
        lambda s, t: process.reverse_step(s, X_0, t, EPS[1]),
        lambda s, t: process.predict_x_0(s, X_0, t, EPS[1]),
        lambda s, t: process.predict_eps_bar(s, X_0, t, EPS[1]),
        lambda s, t: process.velocity(s, X_0, t, EPS[1]),
        lambda s, t: process.predict_eps_bar_from_velocity(s, X_0, t, EPS[1]),
        lambda s, t: process.variance_between(s, t, 0),
        lambda s, t: process.posterior_mean(s, X_0, EPS[1], t),
    ],
)
def test_a_t_that_is_no_step_is_rejected(rough, formula):
    """JAX would clamp 5 to 4 and take -1 for 4; a vector of steps would be broadcast along the last axis."""
    formula(rough, 4), formula(rough, np.int32(1))
    for t in (5, -1, 1.0, [1], np.array([1, 2, 3, 4, 1]), "1"):
        with pytest.raises(ValueError, match=r"t=.* must be an integer in [01]\.\.4"):
            formula(rough, t)
    with pytest.raises(ValueError, match=r"t=.* must be an integer"):
        jax.jit(lambda t: formula(rough, t))(np.array([1, 2, 3, 4, 1]))


def test_interpolated_sigma_lies_between_the_two_fixed_ones(rough):
    """v = 1 is β_t, v = −1 the posterior's deviation with σ̃_2 at t = 1, v = 0 their geometric mean."""
    posterior = np.asarray(schedule.sigma_posterior(rough))
    for t in (1, 2, 4):
        low, high = posterior[max(t, 2)], rough.beta[t]
        sigma = process.interpolated_sigma(rough, t, np.array([-1.0, 0.0, 1.0, 0.5]))
        expected = [low, np.sqrt(low * high), high, low**0.25 * high**0.75]
        np.testing.assert_allclose(sigma, expected, rtol=1e-5)


def test_x_0_of_the_velocity(rough):
    x_0, eps_bar = np.random.default_rng(0).standard_normal((2, 5))
    for s in (rough, schedule.zero_terminal(rough)):
        for t in (1, 4):
            v = process.velocity(s, x_0, t, eps_bar)
            actual = process.predict_x_0_from_velocity(s, process.forward(s, x_0, t, eps_bar), t, v)
            np.testing.assert_allclose(actual, x_0, rtol=1e-5, atol=1e-6)
