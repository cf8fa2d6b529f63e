"""The variational bound: formulas in float64 on four rough steps, then data whose bound is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import likelihood, losses, process, schedule
from diffusion_jax.evaluation.bound import rate_distortion

LEVELS = np.arange(256, dtype=np.float32) / 127.5 - 1
KEYS = jax.random.split(jax.random.key(0), 3)
X = LEVELS[np.random.default_rng(1).integers(0, 256, (3, 2, 2, 1))]
EPS_BAR = np.random.default_rng(2).standard_normal((3, 2, 2, 1)).astype(np.float32)

# As one program each; op by op they take seconds.
decoder_log_likelihood = jax.jit(likelihood.decoder_log_likelihood, static_argnames="exact")
vlb_term = jax.jit(likelihood.vlb_term, static_argnames=("eps_bar_fn", "clip", "exact"))


def network(x, t):
    """A stand-in for the network: different at each t and at each pixel."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1


# ---------------------------------------------------------------- the decoder


@pytest.mark.parametrize("std", [0.002, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.0, 0.99])
def test_decoder_is_the_mass_of_a_bin(mean, std):
    inner = np.arange(-254, 255, 2) / 255  # the edges between two bins
    borders = np.concatenate([[-np.inf], inner, [np.inf]])
    upper, lower = (borders[1:] - mean) / std, (borders[:-1] - mean) / std
    left = np.where(upper + lower > 0, stats.norm.sf(lower) - stats.norm.sf(upper), 0)
    mass = np.where(upper + lower > 0, left, stats.norm.cdf(upper) - stats.norm.cdf(lower))
    actual = decoder_log_likelihood(LEVELS, jnp.float32(mean), jnp.log(jnp.float32(std)))
    representable = mass > 1e-250
    np.testing.assert_allclose(actual[representable], np.log(mass[representable]), rtol=2e-4, atol=2e-4)
    assert np.isfinite(actual).all()
    assert np.exp(np.asarray(actual, np.float64)).sum() == pytest.approx(1, abs=1e-4)


def test_decoder_is_finite_far_from_the_pixel():
    """Φ is 0 in float32 there; the log likelihood still falls and its gradient still points to the pixel."""
    far, farther = (decoder_log_likelihood(LEVELS[100], m, jnp.log(0.01)) for m in (0.5, 0.8))
    assert farther < far < -1000
    slope = jax.grad(lambda m: decoder_log_likelihood(LEVELS[100], m, jnp.log(0.01)))(0.5)
    assert slope == pytest.approx(-(0.5 - float(LEVELS[100])) / 0.01**2, rel=0.02)


def test_decoder_by_tanh():
    """Ho et al.'s approximation is close to the exact mass, has a floor and has open bins at both ends."""
    mean, log_std = jnp.float32(0.1), jnp.log(jnp.float32(0.02))
    approximate = decoder_log_likelihood(LEVELS, mean, log_std, exact=False)
    exact = decoder_log_likelihood(LEVELS, mean, log_std)
    near = abs(LEVELS - 0.1) < 0.06
    assert 0 < abs(approximate - exact)[near].max() < 0.1
    assert approximate.min() == pytest.approx(np.log(1e-12))

    def cdf(x):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    for k in (0, 100, 140, 255):
        upper = 1.0 if k == 255 else cdf((LEVELS[k] + 1 / 255 - 0.1) / 0.3)
        lower = 0.0 if k == 0 else cdf((LEVELS[k] - 1 / 255 - 0.1) / 0.3)
        actual = decoder_log_likelihood(LEVELS[k], mean, jnp.log(0.3), exact=False)
        assert actual == pytest.approx(np.log(upper - lower), abs=1e-3)


# ---------------------------------------------------------------- the formulas, in float64


def kl(mean, variance, other_mean, other_variance):
    return 0.5 * (np.log(other_variance / variance) + (variance + (mean - other_mean) ** 2) / other_variance - 1)


def test_prior_kl(rough):
    a = np.float64(rough.alpha_bar[-1])
    expected = kl(a * X.astype(np.float64), 1 - a**2, 0.0, 1.0)
    np.testing.assert_allclose(likelihood.prior_kl(rough, X), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, (-0.5, 0.75)])
@pytest.mark.parametrize("name", ["beta", "posterior", "other"])
def test_terms_are_the_divergences_of_two_normals(rough, name, clip):
    sigma = {"beta": schedule.sigma_beta, "posterior": schedule.sigma_posterior}.get(
        name, lambda s: np.array([9.0, 9.0, 0.2, 0.3, 0.4])
    )(rough)
    posterior = np.asarray(schedule.sigma_posterior(rough), np.float64)
    for t in (1, 2, 3, 4):
        x_t = process.forward(rough, X, t, EPS_BAR)
        x_0 = process.predict_x_0(rough, x_t, t, network(x_t, np.full(3, t)))
        x_0 = np.asarray(x_0 if clip is None else jnp.clip(x_0, *clip))
        means = [np.asarray(process.posterior_mean(rough, x, x_t, t), np.float64) for x in (X, x_0)]
        if t == 1:  # the standard deviation of the decoder does not depend on sigma
            nats = -decoder_log_likelihood(X, x_0, np.log(posterior[2]))
        else:
            nats = kl(means[0], posterior[t] ** 2, means[1], np.float64(sigma[t]) ** 2)
        expected = np.asarray(nats).mean(axis=(1, 2, 3)) / np.log(2)
        actual = vlb_term(network, rough, sigma, X, np.full(3, t), EPS_BAR, clip=clip)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def test_examples_of_a_batch_may_have_different_t(rough):
    sigma, ts = schedule.sigma_beta(rough), np.array([3, 1, 4])
    together = vlb_term(network, rough, sigma, X, ts, EPS_BAR)
    for i, t in enumerate(ts):
        alone = vlb_term(network, rough, sigma, X[i : i + 1], ts[i : i + 1], EPS_BAR[i : i + 1])
        assert alone[0] == pytest.approx(float(together[i]), rel=1e-5), t


def test_decoder_std_and_tanh_reach_the_decoder(rough):
    term = vlb_term(
        network, rough, schedule.sigma_beta(rough), X, np.ones(3, int), EPS_BAR, decoder_std=0.3, exact=False
    )
    x_1 = process.forward(rough, X, 1, EPS_BAR)
    x_0 = process.predict_x_0(rough, x_1, 1, network(x_1, np.ones(3)))
    nats = -decoder_log_likelihood(X, x_0, np.log(0.3), exact=False)
    np.testing.assert_allclose(term, np.asarray(nats).mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-5)
    with pytest.raises(ValueError, match="T=1: give decoder_std"):
        likelihood.default_decoder_std(schedule.ho_linear(1))


def test_the_bound_is_the_sum_of_its_parts(rough):
    sigma = schedule.sigma_posterior(rough)
    bound = likelihood.vlb(network, rough, sigma, X, KEYS, clip=(-1, 1))
    assert bound["terms"].shape == (4,)
    for t in (1, 2, 3, 4):
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, t), (2, 2, 1)) for key in KEYS])
        term = vlb_term(network, rough, sigma, X, np.full(3, t), noise, clip=(-1, 1))
        assert bound["terms"][t - 1] == pytest.approx(float(term.mean()), rel=1e-5)
    assert bound["prior"] == pytest.approx(float(likelihood.prior_kl(rough, X).mean()) / np.log(2), rel=1e-6)
    assert bound["decoder"] == bound["terms"][0]
    assert bound["rate"] == pytest.approx(float(bound["prior"] + bound["terms"][1:].sum()), rel=1e-6)
    assert bound["total"] == pytest.approx(float(bound["rate"] + bound["decoder"]), rel=1e-6)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 1)) for key in KEYS])
    x_1 = process.forward(rough, X, 1, noise)
    x_0 = np.clip(process.predict_x_0(rough, x_1, 1, network(x_1, np.ones(3))), -1, 1)
    assert bound["distortion"] == pytest.approx(127.5 * np.sqrt(np.mean((x_0 - X) ** 2)), rel=1e-5)


def test_squared_error_and_loss_of_each_step(rough):
    terms, squared_error, loss, _ = likelihood.vlb_by_step(network, rough, schedule.sigma_beta(rough), X, KEYS)
    assert terms.shape == squared_error.shape == loss.shape == (4, 3)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 3), (2, 2, 1)) for key in KEYS])
    np.testing.assert_allclose(loss[2], losses.simple_loss(network, rough, X, np.full(3, 3), noise), rtol=1e-5)
    ratio = (rough.beta_bar[3] / rough.alpha_bar[3]) ** 2  # by (6), an error of ε̄ scales to one of x_0
    np.testing.assert_allclose(squared_error[2], loss[2] * ratio, rtol=1e-4)


def test_rate_and_distortion_of_progressive_coding():
    rate, distortion = rate_distortion(0.5, [4.0, 3.0, 2.0, 1.0], [0.0, 0.01, 0.04, 1.0])
    np.testing.assert_allclose(rate, [6.5, 3.5, 1.5, 0.5])
    np.testing.assert_allclose(distortion, [0, 12.75, 25.5, 127.5])


@pytest.mark.parametrize("sigma", [schedule.sigma_beta, schedule.sigma_posterior])
def test_float32_is_enough(sigma):
    """With a perfect network only the ratio of the deviations remains; its 999 terms sum to the float64 value."""
    s = schedule.ho_linear(1000)
    beta, beta_bar, deviation = (np.asarray(x, np.float64) for x in (s.beta, s.beta_bar, sigma(s)))
    ratio = (beta[2:] * beta_bar[1:-1] / (beta_bar[2:] * deviation[2:])) ** 2
    exact = 0.5 * (ratio - 1 - np.log(ratio)).sum() / np.log(2)
    x_0 = X[0, 0, 0]
    terms = jax.vmap(lambda t: likelihood.step_kl(s, sigma(s), x_0, x_0, t))(jnp.arange(2, 1001))
    assert np.asarray(terms, np.float64).sum() / np.log(2) == pytest.approx(exact, abs=1e-6)
    assert (np.asarray(terms) >= 0).all()


def test_some_terms_are_those_of_all(rough):
    """Each example may have steps of its own."""
    x_0 = np.random.default_rng(0).choice([-1.0, 0.2], (3, 5)).astype(np.float32)
    arguments = lambda x, t: 0.5 * x, rough, schedule.sigma_beta(rough), x_0, jax.random.split(jax.random.key(1), 3)
    every = likelihood.vlb_by_step(*arguments)
    for some, one in zip(every, likelihood.vlb_by_step(*arguments, ts=np.array([4, 1])), strict=True):
        np.testing.assert_allclose(one, np.asarray(some)[[3, 0]], rtol=1e-6)
    ts = np.array([[1, 2, 4], [3, 3, 1]])
    for some, one in zip(every, likelihood.vlb_by_step(*arguments, ts=ts), strict=True):
        np.testing.assert_allclose(one, np.take_along_axis(np.asarray(some), ts - 1, axis=0), rtol=1e-6)


# ---------------------------------------------------------------- data whose bound is known


@pytest.mark.slow
@pytest.mark.parametrize(
    "s, sigma, bits",
    [
        (schedule.ho_linear(1000), schedule.sigma_posterior, 1.51675),
        (schedule.su_linear(1000), schedule.sigma_posterior, 1.22711),
    ],
    ids=["Ho", "Su"],
)
def test_pixels_from_a_fair_coin(s, sigma, bits):
    """Pixels are 0 or 255 and the optimal network predicts x_0 = tanh(ᾱ x / β̄²). The bound exceeds their 1 bit."""

    def optimal(x, t):
        a, b = s.alpha_bar[t][:, None], s.beta_bar[t][:, None]
        return (x - a * jnp.tanh(a * x / b**2)) / b

    x_0 = np.random.default_rng(0).choice([-1.0, 1.0], (8, 20_000)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 8)
    bound = jax.jit(lambda x: likelihood.vlb(optimal, s, sigma(s), x, keys, exact=False))(x_0)
    assert float(bound["total"]) == pytest.approx(bits, abs=1e-3)


def test_the_bound_is_tight_on_gaussian_data_with_the_true_reverse_variance(rough):
    """The bound equals the entropy of the data plus KL(q(x_T) ‖ N(0, 1))."""
    deviation = 0.25
    v = np.asarray(rough.alpha_bar, np.float64) ** 2 * deviation**2 + np.asarray(rough.beta_bar, np.float64) ** 2
    sigma = np.concatenate([[0.0], np.asarray(rough.beta, np.float64)[1:] * np.sqrt(v[:-1] / v[1:])])

    def optimal(x, t):
        return rough.beta_bar[t][:, None] * x / jnp.asarray(v, jnp.float32)[t][:, None]

    x_0 = np.random.default_rng(0).normal(0, deviation, (8, 50_000))
    x_0 = (np.rint((np.clip(x_0, -1, 1) + 1) * 127.5) / 127.5 - 1).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 8)
    bound = likelihood.vlb(optimal, rough, jnp.asarray(sigma), x_0, keys, decoder_std=sigma[1])
    entropy = stats.norm(scale=deviation).entropy() - np.log(2 / 255)
    tight = (entropy + kl(0.0, v[-1], 0.0, 1.0)) / np.log(2)
    assert float(bound["total"]) == pytest.approx(tight, abs=3e-3)
    other = likelihood.vlb(optimal, rough, schedule.sigma_beta(rough), x_0, keys, decoder_std=sigma[1])
    assert float(other["total"]) > tight + 0.02


# ---------------------------------------------------------------- the training objective


def test_vlb_loss_is_num_steps_times_the_term(rough):
    sigma, ts = schedule.sigma_beta(rough), np.array([1, 2, 4])
    expected = 4 * np.asarray(vlb_term(network, rough, sigma, X, ts, EPS_BAR))
    np.testing.assert_allclose(losses.vlb_loss(network, rough, sigma, X, ts, EPS_BAR), expected, rtol=1e-6)


@pytest.mark.parametrize("sigma", [schedule.sigma_beta, schedule.sigma_posterior])
def test_importance_is_the_share_of_each_term_on_gaussian_data(sigma):
    s, deviation = schedule.ho_linear(20, 0.02, 0.4), 0.25
    v = s.alpha_bar**2 * deviation**2 + s.beta_bar**2

    def optimal(x, t):
        return s.beta_bar[t][:, None] * x / v[t][:, None]

    x_0 = np.random.default_rng(0).normal(0, deviation, (8, 20_000)).astype(np.float32)
    terms, *_ = likelihood.vlb_by_step(optimal, s, sigma(s), x_0, jax.random.split(jax.random.key(0), 8))
    p = losses.importance(s, sigma(s), deviation)
    assert p[0] == 0
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(p[1:], np.asarray(terms).mean(axis=1) / np.asarray(terms).mean(axis=1).sum(), rtol=0.02)


def learned(v):
    """Returns the network with the deviations that v [...] gives it."""

    def prediction_fn(x, t):
        sigma = jax.vmap(lambda t: process.interpolated_sigma(rough_schedule(), t, v))(t)
        return process.Prediction(network(x, t), sigma=sigma)

    return prediction_fn


def rough_schedule():
    return schedule.from_beta_squared([0.3, 0.05, 0.6, 0.2])


def test_terms_with_learned_deviations_are_those_with_an_array(rough):
    """v = 1 is σ = β and v = −1 the posterior; the deviation of t = 1 is that of the decoder."""
    ts, unused = np.array([1, 2, 4]), np.full(5, 9.0)
    for v, sigma, decoder_std in (
        (1.0, schedule.sigma_beta(rough), rough.beta[1]),
        (-1.0, schedule.sigma_posterior(rough), schedule.sigma_posterior(rough)[2]),
    ):
        actual = likelihood.vlb_term(learned(np.full((2, 2, 1), v)), rough, unused, X, ts, EPS_BAR)
        expected = vlb_term(network, rough, sigma, X, ts, EPS_BAR, decoder_std=decoder_std)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_deviation_may_differ_between_entries(rough):
    """Two halves of an image, each with its own v: the mean of the terms of two images of one v."""
    v = np.concatenate([np.full((1, 2, 1), 0.5), np.full((1, 2, 1), -0.5)])
    ts = np.array([2, 3, 4])

    def halves(v):
        each = [
            likelihood.vlb_term(learned(v), rough, np.ones(5), X[:, rows], ts, EPS_BAR[:, rows])
            for rows, v in ((slice(0, 1), v[:1]), (slice(1, 2), v[1:]))
        ]
        return np.mean(each, axis=0)

    actual = likelihood.vlb_term(learned(v), rough, np.ones(5), X, ts, EPS_BAR)
    np.testing.assert_allclose(actual, halves(v), rtol=1e-5)


def test_a_prediction_of_x_0_is_taken_as_it_is(rough):
    """At ᾱ_T = 0 ε̄ does not tell it: the term is the divergence from the step that the given x_0 leads to."""
    s = schedule.zero_terminal(rough)
    sigma, x_0 = schedule.sigma_beta(s), 0.3 * np.ones_like(X)

    def prediction_fn(x, t):
        return process.Prediction(x, x_0)

    actual = likelihood.vlb_term(prediction_fn, s, sigma, X, np.full(3, 4), EPS_BAR)
    large, small = np.float64(sigma[4]), np.float64(schedule.sigma_posterior(s)[4])
    means = (np.float64(process.posterior_mean(s, x, EPS_BAR, 4)) for x in (X, x_0))  # x_4 is the noise alone
    shift = np.square(np.subtract(*means)) / large**2
    expected = np.log(large / small) + 0.5 * (small**2 / large**2 + shift) - 0.5
    np.testing.assert_allclose(actual, np.mean(expected, axis=(1, 2, 3)) / np.log(2), rtol=1e-5)
    assert np.isfinite(likelihood.vlb(prediction_fn, s, sigma, X, KEYS)["total"])


def test_mean_square_of_the_predicted_noise(rough):
    *_, mean_square = likelihood.vlb_by_step(network, rough, schedule.sigma_beta(rough), X, KEYS)
    for t in (1, 4):
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, t), X.shape[1:]) for key in KEYS])
        predicted = network(process.forward(rough, X, t, noise), np.full(3, t))
        np.testing.assert_allclose(mean_square[t - 1], np.mean(predicted**2, axis=(1, 2, 3)), rtol=1e-5)


def test_hybrid_loss_is_the_sum_and_its_bound_moves_the_deviations_alone(rough):
    ts = np.array([1, 2, 4])

    def loss(scale, v, losses_fn):
        def prediction_fn(x, t):
            found = learned(v * jnp.ones((2, 2, 1)))(x, t)
            return found._replace(eps_bar=scale * found.eps_bar)

        return losses_fn(prediction_fn).sum()

    def hybrid(fn):
        return losses.hybrid_loss(fn, rough, X, ts, EPS_BAR, share=0.25)

    def simple(fn):
        return losses.simple_loss(lambda x, t: fn(x, t).eps_bar, rough, X, ts, EPS_BAR)

    def bound(fn):
        return losses.vlb_loss(fn, rough, np.ones(5), X, ts, EPS_BAR)

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    value, (of_scale, of_v) = value_and_grad(1.3, 0.2, hybrid)
    of_simple, of_bound = (value_and_grad(1.3, 0.2, fn) for fn in (simple, bound))
    np.testing.assert_allclose(value, of_simple[0] + 0.25 * of_bound[0], rtol=1e-5)
    np.testing.assert_allclose(of_scale, of_simple[1][0], rtol=1e-4)
    np.testing.assert_allclose(of_v, 0.25 * of_bound[1][1], rtol=1e-4)
    assert abs(of_bound[1][0]) > 0.1 and abs(of_v) > 1e-3
