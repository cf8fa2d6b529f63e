import jax
import numpy as np
import pytest

from diffusion_jax import sampling, schedule

BETA_SQUARED = np.array([0.3, 0.05, 0.6, 0.2])


def test_arrays_of_the_rough_schedule(rough):
    assert rough.num_steps == 4
    np.testing.assert_allclose(rough.beta, np.sqrt([0, 0.3, 0.05, 0.6, 0.2]), rtol=1e-7)
    np.testing.assert_allclose(rough.alpha, np.sqrt([1, 0.7, 0.95, 0.4, 0.8]), rtol=1e-7)
    products = [1, 0.7, 0.7 * 0.95, 0.7 * 0.95 * 0.4, 0.7 * 0.95 * 0.4 * 0.8]
    np.testing.assert_allclose(rough.alpha_bar, np.sqrt(products), rtol=1e-7)
    np.testing.assert_allclose(rough.beta_bar, np.sqrt(1 - np.array(products)), rtol=1e-7)
    assert all(array.dtype == np.float32 for array in rough)


def test_entry_0_is_clean_data(rough):
    assert [float(array[0]) for array in rough] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("values, shape", [([], "0,"), ([[0.1]], "1, 1"), (0.1, "")])
def test_beta_squared_of_another_shape_is_rejected(values, shape):
    with pytest.raises(ValueError, match=rf"beta_squared has shape \({shape}\)"):
        schedule.from_beta_squared(values)


@pytest.mark.parametrize("values, number", [([0.1, 1.0], "1.0"), ([-0.1], "-0.1"), ([float("nan"), 0.1], "nan")])
def test_beta_squared_out_of_range_is_rejected(values, number):
    with pytest.raises(ValueError, match=f"beta_squared holds {number}: "):
        schedule.from_beta_squared(values)


@pytest.mark.parametrize("named", [schedule.su_linear, schedule.ho_linear, schedule.cosine, schedule.sigmoid])
def test_steps_that_are_no_count_are_rejected(named):
    for num_steps in (0, -1, 1.5, "3", True, 2**24 + 1, 2**64):
        with pytest.raises(ValueError, match=r"num_steps='?\S+ must be an integer in 1\.\.16777216"):
            named(num_steps)


def test_a_schedule_made_inside_a_program_has_a_grid():
    """Its numbers are no tracers."""
    grids = []
    jax.jit(lambda: grids.append(sampling.grid_log_snr(schedule.ho_linear(20), 5)))()
    np.testing.assert_array_equal(grids[0], sampling.grid_log_snr(schedule.ho_linear(20), 5))


def test_arrays_are_rounded_to_float32_once():
    """β̄_1 = β_1 = 0.01 exactly; a float32 product is off by 1.7e-4."""
    s = schedule.ho_linear()
    np.testing.assert_allclose(s.beta_bar[1], 0.01, rtol=1e-7)
    s = schedule.su_linear()
    np.testing.assert_allclose(s.beta_bar[1], np.sqrt(2e-5), rtol=1e-7)


def test_su_linear():
    s = schedule.su_linear(4, scale=0.4)
    np.testing.assert_allclose(s.alpha, np.sqrt([1, 0.9, 0.8, 0.7, 0.6]), rtol=1e-7)
    np.testing.assert_allclose(schedule.su_linear().alpha[-1] ** 2, 0.98, rtol=1e-6)
    np.testing.assert_allclose(schedule.su_linear().alpha_bar[-1], 0.0065, atol=5e-5)
    np.testing.assert_allclose(schedule.su_linear(100).alpha_bar[-1], 0.60, atol=5e-3)


def test_ho_linear():
    s = schedule.ho_linear(3, start=0.1, end=0.5)
    np.testing.assert_allclose(s.beta**2, [0, 0.1, 0.3, 0.5], rtol=1e-6)
    s = schedule.ho_linear()
    np.testing.assert_allclose(s.beta[1] ** 2, 1e-4, rtol=1e-6)
    np.testing.assert_allclose(s.beta[-1] ** 2, 0.02, rtol=1e-6)
    np.testing.assert_allclose(s.alpha_bar[-1] ** 2, 4.0358e-5, rtol=1e-4)  # Ho et al.: KL at T of about 1e-5 bits


def test_cosine():
    """ᾱ_t² / ᾱ_0² is the cosine before the last step, where the cap of β² applies."""
    s = schedule.cosine(8)
    f = [np.cos((t / 8 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(8)]
    np.testing.assert_allclose(s.alpha_bar[:8] ** 2, np.array(f) / f[0], rtol=1e-5)
    np.testing.assert_allclose(s.beta[-1] ** 2, 0.999, rtol=1e-6)


def test_sigmoid():
    """At t/T = 1/4 and 3/4 the logistic function of ∓1.5/τ, scaled to 1 at t = 0 and cut at 1e-9 at T."""
    for tau in (1.0, 0.5):
        s = schedule.sigmoid(4, tau=tau)
        logistic = 1 / (1 + np.exp(-np.array([-3, -1.5, 0, 1.5, 3]) / tau))
        square = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
        square[-1] = 1e-9
        np.testing.assert_allclose(s.alpha_bar**2, square, rtol=1e-6)
        np.testing.assert_allclose(s.beta_bar**2, 1 - square, rtol=1e-6)
        np.testing.assert_allclose(s.alpha[1:] ** 2, square[1:] / square[:-1], rtol=1e-6)
    assert not np.allclose(schedule.sigmoid(4, start=0.0).alpha_bar, schedule.sigmoid(4).alpha_bar)


def consistent(s):
    """Asserts that the four arrays are those of one schedule."""
    arrays = [np.asarray(array, np.float64) for array in s]
    alpha, beta, alpha_bar, beta_bar = arrays
    np.testing.assert_allclose(np.cumprod(alpha), alpha_bar, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(alpha**2 + beta**2, 1, rtol=1e-6)
    np.testing.assert_allclose(alpha_bar**2 + beta_bar**2, 1, rtol=1e-6)
    assert all(array.dtype == np.float32 for array in s) and [array[0] for array in arrays] == [1, 0, 1, 0]


def test_snr(rough):
    products = np.cumprod(1 - BETA_SQUARED)
    np.testing.assert_allclose(schedule.snr(rough), [np.inf, *products / (1 - products)], rtol=1e-6)


def test_zero_terminal(rough):
    """ᾱ is moved to 0 at T and kept at t = 1, by one line."""
    s = schedule.zero_terminal(rough)
    consistent(s)
    alpha_bar = np.sqrt(np.cumprod(1 - BETA_SQUARED))
    assert s.alpha_bar[4] == 0 and s.alpha[4] == 0 and s.beta[4] == s.beta_bar[4] == 1
    np.testing.assert_allclose(s.alpha_bar[1], alpha_bar[0], rtol=1e-6)
    moved = np.diff(np.asarray(s.alpha_bar[1:], np.float64)) / np.diff(alpha_bar)
    np.testing.assert_allclose(moved, moved[0], rtol=1e-5)
    np.testing.assert_allclose(schedule.zero_terminal(schedule.ho_linear()).beta_bar[1], 0.01, rtol=1e-6)
    with pytest.raises(ValueError, match="T >= 2 steps"):
        schedule.zero_terminal(schedule.ho_linear(1))


def test_shifted(rough):
    """Every SNR is multiplied by the same number, also where float32 would lose it, and a zero stays."""
    for s in (rough, schedule.ho_linear(), schedule.zero_terminal(rough)):
        moved = schedule.shifted(s, np.log(0.25))
        consistent(moved)
        np.testing.assert_allclose(schedule.snr(moved)[1:], 0.25 * schedule.snr(s)[1:], rtol=2e-5)
    np.testing.assert_allclose(schedule.shifted(rough, 0.0).beta, rough.beta, rtol=1e-6)


def test_sigma_analytic_is_the_true_deviation_of_gaussian_data(rough):
    """x_0 ~ N(0, d²), x_t = ᾱ x_0 + β̄ ε̄: the deviation of x_{t−1} given x_t, from their covariance."""
    d, alpha_bar_squared = 0.7, np.concatenate([[1], np.cumprod(1 - BETA_SQUARED)])
    variance = alpha_bar_squared * d**2 + 1 - alpha_bar_squared
    mean_square = (1 - alpha_bar_squared) / variance  # of the optimal ε̄ = β̄ x/v
    sigma = schedule.sigma_analytic(rough, mean_square)
    for t in range(1, 5):
        covariance = np.sqrt(1 - BETA_SQUARED[t - 1]) * variance[t - 1]
        np.testing.assert_allclose(sigma[t] ** 2, variance[t - 1] - covariance**2 / variance[t], rtol=1e-5)
    of_x_0 = d**2 - alpha_bar_squared * d**4 / variance
    np.testing.assert_allclose(schedule.x_0_variance(rough, mean_square), of_x_0, rtol=1e-5)
    assert (schedule.x_0_variance(rough, np.full(5, 1.1)) == 0).all()  # a poor network's m_t
    assert schedule.x_0_variance(schedule.zero_terminal(rough), mean_square)[4] == 1
    np.testing.assert_allclose(schedule.sigma_analytic(rough, np.ones(5)), schedule.sigma_posterior(rough), rtol=1e-6)


def test_sigma_zero_and_beta(rough):
    np.testing.assert_array_equal(schedule.sigma_zero(rough), np.zeros(5))
    np.testing.assert_array_equal(schedule.sigma_beta(rough), rough.beta)


def test_sigma_posterior_is_the_conditional_standard_deviation(rough):
    """The covariance of (x_{t−1}, x_t) conditional on x_0 gives Var(x_{t−1} | x_t, x_0)."""
    alpha_bar_squared = np.concatenate([[1], np.cumprod(1 - BETA_SQUARED)])
    sigma = schedule.sigma_posterior(rough)
    assert sigma.shape == (5,) and sigma[0] == 0
    for t in range(1, 5):
        variance_prev, variance = 1 - alpha_bar_squared[t - 1], 1 - alpha_bar_squared[t]
        covariance = np.sqrt(1 - BETA_SQUARED[t - 1]) * variance_prev
        conditional = variance_prev - covariance**2 / variance
        np.testing.assert_allclose(sigma[t], np.sqrt(max(conditional, 0)), rtol=1e-5, atol=1e-7)
