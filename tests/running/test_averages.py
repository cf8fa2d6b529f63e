import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.running import averages

LENGTHS = [0.01, 0.05, 0.1, 0.2, 0.288]


def profile(tau, t, gamma):
    """The definition: (γ + 1) τ^γ / t^(γ+1) on [0, t], 0 beyond."""
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


def integral(values, tau):
    return float(np.trapezoid(values, tau))


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_exponent_gives_a_profile_of_the_relative_length(sigma_rel):
    gamma, t, tau = averages.exponent(sigma_rel), 3.0, np.linspace(0, 3, 400_001)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-12)
    p = profile(tau, t, gamma)
    mean = integral(tau * p, tau)
    assert integral(p, tau) == pytest.approx(1, abs=1e-5)
    assert integral((tau - mean) ** 2 * p, tau) ** 0.5 / t == pytest.approx(sigma_rel, rel=1e-4)


def test_the_exponents_of_the_paper():
    assert list(averages.EXPONENTS) == pytest.approx([16.97, 6.94], abs=5e-3)
    assert averages.exponent(12**-0.5) == pytest.approx(0, abs=1e-9)  # the plain mean


@pytest.mark.parametrize(("t_a", "t_b"), [(1.0, 1.0), (0.4, 1.0), (1.0, 0.7)])
def test_the_inner_product_is_the_integral(t_a, t_b):
    tau = np.linspace(0, 1, 200_001)
    for a, b in [(6.94, 16.97), (16.97, 6.94), (0.5, 3.0)]:
        expected = integral(profile(tau, t_a, a) * profile(tau, t_b, b), tau)
        assert averages.inner_product(t_a, a, t_b, b) == pytest.approx(expected, rel=1e-3)


def test_the_rate_keeps_its_digits_in_float32():
    for n in (1, 2, 10, 800_000):
        for gamma in averages.EXPONENTS:
            exact = 1.0 if n == 1 else -np.expm1((gamma + 1) * np.log1p(-1 / n))
            assert averages.rate(jnp.float32(n), gamma) == pytest.approx(exact, rel=1e-6)


def test_an_average_weights_each_step_by_the_integral_of_its_profile():
    """Parameters that are 1 at one step each show their weights; those before the first step have none."""
    num, trees = 12, tuple({"w": jnp.full(12, 7.0)} for _ in averages.EXPONENTS)
    for n in range(1, num + 1):
        params = {"w": jnp.eye(num, dtype=jnp.float32)[n - 1]}
        trees = averages.updated(trees, params, jnp.int32(n), averages.EXPONENTS)
    k = np.arange(1, num + 1)
    for tree, gamma in zip(trees, averages.EXPONENTS, strict=True):
        expected = (k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / num ** (gamma + 1)
        np.testing.assert_allclose(tree["w"], expected, atol=1e-7)


def bases(num_snapshots, steps):
    """Returns t and γ of both averages at equal distances up to `steps`."""
    t = np.linspace(0, steps, num_snapshots + 1)[1:]
    return np.repeat(t, 2), np.tile(averages.EXPONENTS, num_snapshots)


def test_a_stored_average_is_its_own_fit():
    t, gamma = bases(10, 500.0)
    for i in (0, 7, 18, 19):
        weights, error = averages.fit(t, gamma, t[i], gamma[i])
        np.testing.assert_allclose(weights, np.arange(20) == i, atol=1e-9)
        assert error < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.15, 0.25])
def test_the_fit_is_the_nearest_whose_weights_sum_to_1(sigma_rel):
    t, gamma = bases(6, 1.0)
    wanted = averages.exponent(sigma_rel)
    weights, error = averages.fit(t, gamma, 1.0, wanted)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    tau = np.linspace(0, 1, 50_001)
    basis = np.array([profile(tau, *of) for of in zip(t, gamma, strict=True)])

    def distance(weights):
        difference = weights @ basis - profile(tau, 1.0, wanted)
        return integral(difference**2, tau)

    norm = integral(profile(tau, 1.0, wanted) ** 2, tau)
    assert error == pytest.approx((distance(weights) / norm) ** 0.5, rel=1e-3)
    for i in range(12):
        for sign in (-1e-2, 1e-2):
            other = weights + sign * (np.arange(12) == i) - sign / 12
            assert distance(other) > distance(weights)


# {relative length: bound of the error of the post-hoc average, in units of the distance that it has to the parameters}
ERRORS = {0.03: 8e-3, 0.05: 1e-9, 0.07: 4e-4, 0.1: 1e-9, 0.15: 4e-4, 0.2: 2.5e-3, 0.25: 2e-2}


def test_post_hoc_averages_are_those_that_were_tracked():
    """A random walk of 2,000 steps with 20 snapshots: the error is 0.02% to 0.7% for lengths of 0.03 to 0.2."""
    steps, every, rng = 2000, 100, np.random.default_rng(0)
    exponents = {s: averages.exponent(s) for s in ERRORS}
    walk = 5 + np.cumsum(rng.normal(size=(steps, 400)), axis=0)
    tracked, stored = {s: np.zeros(400) for s in ERRORS}, []
    for n, theta in enumerate(walk, 1):
        for s, gamma in exponents.items():
            beta = (1 - 1 / n) ** (gamma + 1)
            tracked[s] = beta * tracked[s] + (1 - beta) * theta
        if n % every == 0:
            stored += [tracked[s] for s in averages.SIGMA_REL]
    t, gamma = bases(steps // every, float(steps))
    for s, bound in ERRORS.items():
        weights, _ = averages.fit(t, gamma, steps, exponents[s])
        difference = np.array(stored).T @ weights - tracked[s]
        error = np.linalg.norm(difference) / np.linalg.norm(walk[-1] - tracked[s])
        assert error < bound, s
