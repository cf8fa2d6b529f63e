import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import losses, process, schedule

T = np.array([1, 2, 3, 4])
X_0 = np.array([[0.5, -1.0, 0.2], [1.0, 0.3, -0.4], [-0.6, 0.8, 0.1], [0.9, -0.2, 0.7]])


def network(x, t):
    """A stand-in for the network: nonlinear and different at each t."""
    return jnp.tanh(x) * t[:, None] + 0.1


def two_noises():
    return np.random.default_rng(0).standard_normal((2, *X_0.shape))


def test_step_loss_term_by_term(rough):
    """(11) in NumPy, where (12) turns the predicted ε̄_t into ε_t."""
    a, b, a_bar, b_bar = (np.asarray(array)[:, None] for array in rough)
    prev, eps = two_noises()
    x_t = a_bar[T] * X_0 + a[T] * b_bar[T - 1] * prev + b[T] * eps
    predicted = b[T] / b_bar[T] * network(x_t, T)
    expected = np.mean((eps - predicted) ** 2, axis=1)
    np.testing.assert_allclose(losses.step_loss(network, rough, X_0, T, prev, eps), expected, rtol=1e-5)


def test_weighted_step_loss_is_the_distance_to_x_prev(rough):
    """(9) = (7): ‖x_{t−1} − μ(x_t)‖² of each example."""
    prev, eps = two_noises()
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
    eps_bar = two_noises()[0]
    expected = np.mean((eps_bar - network(a_bar[T] * X_0 + b_bar[T] * eps_bar, T)) ** 2, axis=1)
    np.testing.assert_allclose(losses.simple_loss(network, rough, X_0, T, eps_bar), expected, rtol=1e-5)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_expected_step_loss_is_the_weighted_simple_loss_plus_a_constant(rough, t):
    """E(11) = (β_t/β̄_t)² E(15) + α_t² β̄_{t−1}² / β̄_t², by (12)–(14).

    The losses of a linear network are quadratic in the noise. Their expectation is the mean over
    points with the first two moments of a Gaussian: ±√2 on each of two axes, or ±1 on one.
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


def test_a_perfect_prediction_has_zero_loss(rough):
    eps_bar = two_noises()[0]
    assert losses.simple_loss(lambda x, t: eps_bar, rough, X_0, T, eps_bar).tolist() == [0, 0, 0, 0]


def test_the_loss_of_an_example_is_the_mean_over_its_entries(rough):
    x_0 = np.zeros((2, 3, 5, 1))
    eps_bar = np.arange(30.0).reshape(x_0.shape)
    actual = losses.simple_loss(lambda x, t: jnp.zeros(x.shape), rough, x_0, T[:2], eps_bar)
    np.testing.assert_allclose(actual, [np.mean(np.arange(15.0) ** 2), np.mean(np.arange(15.0, 30.0) ** 2)])


def test_noises_differ_by_example_and_number_and_not_by_batch(rough):
    keys = jax.random.split(jax.random.key(0), 4)
    recorded = []

    def recording_loss(eps_bar_fn, s, x_0, t, prev, eps):
        recorded.append((prev, eps))
        return losses.step_loss(eps_bar_fn, s, x_0, t, prev, eps)

    noisy_loss = losses.with_noise(recording_loss, 2)
    batch = noisy_loss(network, rough, X_0, T, keys)
    half_batch = noisy_loss(network, rough, X_0[2:], T[2:], keys[2:])
    np.testing.assert_array_equal(recorded[0][0][2:], recorded[1][0])
    np.testing.assert_array_equal(recorded[0][1][2:], recorded[1][1])
    np.testing.assert_allclose(batch[2:], half_batch, rtol=1e-6)
    noises = np.concatenate([np.ravel(noise) for noise in recorded[0]])
    assert len(np.unique(noises)) == 2 * X_0.size


# ---------------------------------------------------------------- other predictions


def test_losses_of_other_predictions_are_simple_loss_reweighted(rough):
    """One network predicts x_0, v and ε̄: the loss of x_0 is (15) times (β̄/ᾱ)², the loss of v is (15) over ᾱ²."""
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


def test_networks_of_other_predictions_receive_x_t(rough):
    x_0 = np.full((1, 2, 2, 1), 0.5, np.float32)
    eps_bar, t = np.full_like(x_0, 2.0), np.array([3])
    inputs = []
    for loss in (losses.x_0_loss, losses.velocity_loss):
        loss(lambda x, t: inputs.append((x, t)) or x, rough, x_0, t, eps_bar)
    for x, step in inputs:
        np.testing.assert_allclose(x, process.forward(rough, x_0, 3, eps_bar), rtol=1e-6)
        assert step.tolist() == [3]


def squared(s):
    """Returns ᾱ² and β̄² of t = 1..T in float64."""
    alpha_bar_squared = np.cumprod(np.float64(s.alpha[1:]) ** 2)
    return alpha_bar_squared, 1 - alpha_bar_squared


def test_min_snr_weight_by_its_definition(rough):
    alpha_bar_squared, beta_bar_squared = squared(rough)
    snr = alpha_bar_squared / beta_bar_squared  # 2.3, 2.0, 0.36, 0.27
    for gamma in (0.3, 1.0, 5.0):
        cut = np.minimum(snr, gamma)
        for prediction, expected in (("eps_bar", cut / snr), ("x_0", cut), ("velocity", cut / (snr + 1))):
            weight = losses.min_snr_weight(rough, gamma, prediction)
            np.testing.assert_allclose(weight, [0, *expected], rtol=1e-5)
    terminal = losses.min_snr_weight(schedule.zero_terminal(rough), 1.0)
    assert terminal[4] == 1 and np.isfinite(terminal).all()


def test_p2_weight_by_its_definition(rough):
    alpha_bar_squared, beta_bar_squared = squared(rough)
    snr = alpha_bar_squared / beta_bar_squared
    np.testing.assert_allclose(losses.p2_weight(rough), [0, *1 / (1 + snr)], rtol=1e-5)
    np.testing.assert_allclose(losses.p2_weight(rough, 0.5, 2.0), [0, *(0.5 + snr) ** -2.0], rtol=1e-5)


@pytest.mark.parametrize("weight", [losses.min_snr_weight, losses.p2_weight])
def test_a_weighted_loss_is_the_same_for_every_prediction(rough, weight):
    """Networks that predict x_0 and v, made of one that predicts ε̄."""
    eps_bar = two_noises()[0]
    x_t = jax.vmap(lambda *args: process.forward(rough, *args))(X_0, T, eps_bar)
    predicted = network(x_t, T)
    x_0 = jax.vmap(lambda *args: process.predict_x_0(rough, *args))(x_t, T, predicted)
    velocity = jax.vmap(lambda *args: process.velocity(rough, *args))(x_0, T, predicted)
    of = rough, X_0, T, eps_bar
    expected = weight(rough)[T] * losses.simple_loss(lambda *_: predicted, *of)
    of_x_0 = weight(rough, prediction="x_0")[T] * losses.x_0_loss(lambda *_: x_0, *of)
    of_velocity = weight(rough, prediction="velocity")[T] * losses.velocity_loss(lambda *_: velocity, *of)
    np.testing.assert_allclose(of_x_0, expected, rtol=1e-4)
    np.testing.assert_allclose(of_velocity, expected, rtol=1e-4)
