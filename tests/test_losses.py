import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import losses, process

T = np.array([1, 2, 3, 4])
X_0 = np.array([[0.5, -1.0, 0.2], [1.0, 0.3, -0.4], [-0.6, 0.8, 0.1], [0.9, -0.2, 0.7]])


def network(x, t):
    """Any function will do for the identities: not linear, and different at each t."""
    return jnp.tanh(x) * t[:, None] + 0.1


def noises():
    return np.random.default_rng(0).standard_normal((2, *X_0.shape))


def test_step_loss_term_by_term(rough):
    """(11) in NumPy, with a prediction of ε_t from ε̄_t by (12)."""
    a, b, a_bar, b_bar = (np.asarray(array)[:, None] for array in rough)
    prev, eps = noises()
    x_t = a_bar[T] * X_0 + a[T] * b_bar[T - 1] * prev + b[T] * eps
    predicted = b[T] / b_bar[T] * network(x_t, T)
    expected = np.mean((eps - predicted) ** 2, axis=1)
    np.testing.assert_allclose(losses.step_loss(network, rough, X_0, T, prev, eps), expected, rtol=1e-5)


def test_weighted_step_loss_is_the_distance_to_x_prev(rough):
    """(9) = (7): ‖x_{t−1} − μ(x_t)‖², example by example."""
    prev, eps = noises()
    actual = losses.weighted_step_loss(network, rough, X_0, T, prev, eps)
    for i, t in enumerate(T):
        x_prev = process.forward(rough, X_0[i], t - 1, prev[i])
        x_t = process.forward_step(rough, x_prev, t, eps[i])
        eps_theta = process.step_noise(rough, network(x_t[None], T[i : i + 1])[0], t)
        mu = process.reverse_step(rough, x_t, t, eps_theta)
        np.testing.assert_allclose(actual[i], np.mean((x_prev - mu) ** 2), rtol=1e-5)


def test_simple_loss_term_by_term(rough):
    """(15) in NumPy."""
    _, _, a_bar, b_bar = (np.asarray(array)[:, None] for array in rough)
    eps_bar = noises()[0]
    expected = np.mean((eps_bar - network(a_bar[T] * X_0 + b_bar[T] * eps_bar, T)) ** 2, axis=1)
    np.testing.assert_allclose(losses.simple_loss(network, rough, X_0, T, eps_bar), expected, rtol=1e-5)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_expected_step_loss_is_the_weighted_simple_loss_and_a_constant(rough, t):
    """E(11) = (β_t/β̄_t)² E(15) + α_t² β̄_{t−1}² / β̄_t², by (12)–(14).

    For a linear network the losses are quadratic in the noise, so the expectation is the
    mean over points with the moments of a Gaussian: ±√2 on each of two axes, ±1 on one.
    """

    def linear(x, t):
        return 0.6 * x + 0.1

    axes = np.sqrt(2) * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    steps = np.full(4, t)
    step = losses.step_loss(linear, rough, np.full((4, 1), 0.4), steps, axes[:, :1], axes[:, 1:]).mean()
    simple = losses.simple_loss(linear, rough, np.full((2, 1), 0.4), steps[:2], np.array([[1.0], [-1.0]])).mean()
    a, b, _, b_bar = (np.asarray(array) for array in rough)
    expected = (b[t] / b_bar[t]) ** 2 * simple + (a[t] * b_bar[t - 1] / b_bar[t]) ** 2
    np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_a_perfect_prediction_costs_nothing(rough):
    eps_bar = noises()[0]
    assert losses.simple_loss(lambda x, t: eps_bar, rough, X_0, T, eps_bar).tolist() == [0, 0, 0, 0]


def test_an_example_is_averaged_over_all_its_entries(rough):
    x_0 = np.zeros((2, 3, 5, 1))
    eps_bar = np.arange(30.0).reshape(x_0.shape)
    actual = losses.simple_loss(lambda x, t: jnp.zeros(x.shape), rough, x_0, T[:2], eps_bar)
    np.testing.assert_allclose(actual, [np.mean(np.arange(15.0) ** 2), np.mean(np.arange(15.0, 30.0) ** 2)])


def test_with_noise_draws_per_example_and_per_noise(rough):
    keys = jax.random.split(jax.random.key(0), 4)
    seen = []

    def spy(eps_bar_fn, s, x_0, t, prev, eps):
        seen.append((prev, eps))
        return losses.step_loss(eps_bar_fn, s, x_0, t, prev, eps)

    drawn = losses.with_noise(spy, 2)
    whole = drawn(network, rough, X_0, T, keys)
    half = drawn(network, rough, X_0[2:], T[2:], keys[2:])
    np.testing.assert_array_equal(seen[0][0][2:], seen[1][0])
    np.testing.assert_array_equal(seen[0][1][2:], seen[1][1])
    np.testing.assert_allclose(whole[2:], half, rtol=1e-6)
    four_draws = np.concatenate([np.ravel(noise) for noise in seen[0]])
    assert len(np.unique(four_draws)) == 2 * X_0.size


# ---------------------------------------------------------------- other predictions


def test_losses_of_other_predictions_are_15_reweighted(rough):
    """The same network, seen as one that predicts x_0 or v: ‖·‖² is that of ε̄ times (β̄/ᾱ)², or over ᾱ²."""
    rng = np.random.default_rng(3)
    x_0, eps_bar, other = rng.standard_normal((3, 4, 2, 2, 1)).astype(np.float32)
    t = np.array([1, 2, 3, 4])
    a, b = np.asarray(rough.alpha_bar)[t], np.asarray(rough.beta_bar)[t]
    x_t = jax.vmap(lambda *args: process.forward(rough, *args))(x_0, t, eps_bar)
    as_x_0 = jax.vmap(lambda *args: process.predict_x_0(rough, *args))(x_t, t, other)
    as_v = (other - b[:, None, None, None] * x_t) / a[:, None, None, None]
    simple = losses.simple_loss(lambda x, t: other, rough, x_0, t, eps_bar)
    x_0_loss = losses.x_0_loss(lambda x, t: as_x_0, rough, x_0, t, eps_bar)
    velocity_loss = losses.velocity_loss(lambda x, t: as_v, rough, x_0, t, eps_bar)
    np.testing.assert_allclose(x_0_loss, simple * (b / a) ** 2, rtol=1e-4)
    np.testing.assert_allclose(velocity_loss, simple / a**2, rtol=1e-4)


def test_other_predictions_see_x_t(rough):
    x_0 = np.full((1, 2, 2, 1), 0.5, np.float32)
    eps_bar, t = np.full_like(x_0, 2.0), np.array([3])
    seen = []
    for loss in (losses.x_0_loss, losses.velocity_loss):
        loss(lambda x, t: seen.append((x, t)) or x, rough, x_0, t, eps_bar)
    for x, step in seen:
        np.testing.assert_allclose(x, process.forward(rough, x_0, 3, eps_bar), rtol=1e-6)
        assert step.tolist() == [3]
