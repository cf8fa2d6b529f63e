import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import process, sampling, schedule

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(1).standard_normal((3, 2, 2, 1)).astype(np.float32)


def network(x, t):
    """A stand-in for the network: different at each t and at each pixel."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1


def test_the_chain_is_a_loop_over_17(rough):
    sigma = np.array([9.0, 9.0, 0.2, 0.3, 0.4])  # no noise at t = 1: entry 1 must not be used
    x = X.copy()
    for t in (4, 3, 2, 1):
        eps = process.step_noise(rough, network(x, np.full(3, t)), t)
        z = np.stack([jax.random.normal(jax.random.fold_in(key, t), X.shape[1:]) for key in KEYS])
        x = np.asarray(process.reverse_step(rough, x, t, eps, sigma[t] * z if t > 1 else 0.0))
    np.testing.assert_allclose(sampling.reverse_chain(network, rough, sigma, X, KEYS), x, rtol=2e-6, atol=2e-6)


def test_clip_bounds_the_predicted_x_0(rough):
    """The chain equals a loop that derives ε̄ from the clipped x_0 and does not clip the noise."""
    sigma = np.array([0.0, 0.0, 0.2, 0.3, 0.4])
    x = 3 * X
    for t in (4, 3, 2, 1):
        x_0 = np.clip(process.predict_x_0(rough, x, t, network(x, np.full(3, t))), -0.5, 0.75)
        eps = process.step_noise(rough, process.predict_eps_bar(rough, x, t, x_0), t)
        x = np.asarray(process.reverse_step(rough, x, t, eps, sigma[t] * sampling.normal(KEYS, t, X.shape[1:])))
    actual = sampling.reverse_chain(network, rough, sigma, 3 * X, KEYS, clip=(-0.5, 0.75))
    np.testing.assert_allclose(actual, x, rtol=1e-5, atol=1e-5)
    assert actual.min() == -0.5 and actual.max() == 0.75  # the last step returns the clipped x_0


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_chains_compose_bit_for_bit(rough, clip):
    sigma = schedule.sigma_beta(rough)

    def chain(x, start, stop):
        return sampling.reverse_chain(network, rough, sigma, x, KEYS, start, stop, clip)

    whole = chain(X, None, 0)
    for k in (0, 1, 2, 3, 4):
        np.testing.assert_array_equal(chain(chain(X, 4, k), k, 0), whole)


@pytest.mark.parametrize(
    "start, stop, message",
    [
        (5, 0, r"start=5 must be an integer in 0\.\.4"),
        (2.5, 0, r"start=2\.5 must be an integer"),
        ([3], 0, r"start=\[3\] must be an integer"),
        (2, 3, r"stop=3 must be an integer in 0\.\.2"),
        (4, -1, r"stop=-1 must be"),
    ],
)
def test_start_and_stop_out_of_range_are_rejected(rough, start, stop, message):
    with pytest.raises(ValueError, match=message):
        sampling.reverse_chain(network, rough, np.zeros(5), X, KEYS, start, stop)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t": 0}, r"t=0 must be an integer in 1\.\.4"),
        ({"t": 5}, "t=5 must be"),
        ({"t": [3]}, r"t=\[3\] must be an integer"),
        ({"t": np.array([1, 2, 3])}, r"t=\[1 2 3\] must be an integer"),
        ({"t": 1.0}, r"t=1\.0? must be an integer"),
        ({"sigma": np.zeros(4)}, r"sigma has shape \(4,\): it must be \[T \+ 1\]"),
        ({"sigma": 0.1}, r"sigma has shape \(\)"),
        ({"keys": KEYS[:1]}, r"keys has shape \(1,\): it must hold one key for each of the 3 examples"),
        ({"keys": KEYS[0]}, r"keys has shape \(\)"),
    ],
)
def test_a_step_with_wrong_arguments_is_rejected(rough, change, message):
    """JAX would clamp an index, or broadcast, without a word."""
    given = {"sigma": np.zeros(5), "x": X, "keys": KEYS, "t": 3} | change
    with pytest.raises(ValueError, match=message):
        sampling.ancestral_step(network, rough, **given)


# ---------------------------------------------------------------- Gaussian data, whose optimal network is known


def optimal(s, mean, deviation):
    """ε̄ = β̄_t (x − ᾱ_t m) / v_t with v_t = ᾱ_t² s² + β̄_t², for data N(m, s²)."""

    def eps_bar_fn(x, t):
        a, b = (array[t].reshape(-1, *(1,) * (x.ndim - 1)) for array in (s.alpha_bar, s.beta_bar))
        return b * (x - a * mean) / (a**2 * deviation**2 + b**2)

    return eps_bar_fn


def gains(s, deviation):
    """ᾱ_t s² / v_t, the factor from the deviation of x_t to the deviation of the sample, both from their means."""
    a, b = np.asarray(s.alpha_bar, np.float64), np.asarray(s.beta_bar, np.float64)
    return a * deviation**2 / (a**2 * deviation**2 + b**2)


@pytest.mark.parametrize("sigma_of", [schedule.sigma_zero, schedule.sigma_beta, schedule.sigma_posterior])
@pytest.mark.parametrize("num_steps", [None, 1000])
def test_every_path_on_gaussian_data_ends_at_its_closed_form(rough, sigma_of, num_steps):
    """x_0 = m + gain_T (x_T − ᾱ_T m) + Σ_{t>=2} gain_{t−1} σ_t z_t for each path, not only in the moments."""
    s = schedule.ho_linear(num_steps) if num_steps else rough
    mean, deviation = 0.3, 0.5
    sigma = sigma_of(s)
    gain = gains(s, deviation)
    steps = np.arange(2, s.num_steps + 1)
    z = np.asarray(jax.vmap(lambda t: sampling.normal(KEYS, t, X.shape[1:]))(steps), np.float64)
    expected = mean + gain[-1] * (X - float(s.alpha_bar[-1]) * mean) + np.tensordot(gain[1:-1] * sigma[2:], z, axes=1)
    actual = sampling.reverse_chain(optimal(s, mean, deviation), s, sigma, X, KEYS)
    np.testing.assert_allclose(actual, expected, atol=3e-5)


@pytest.mark.parametrize(
    "sigma_of, expected", [(schedule.sigma_beta, 0.2507521), (schedule.sigma_posterior, 0.2461252)]
)
def test_variance_of_the_chain_on_gaussian_data(sigma_of, expected):
    """Ho's schedule with T = 1000 and data N(0.3, 0.5²): the paths of the closed form have the known variance."""
    s = schedule.ho_linear()
    gain = gains(s, 0.5)
    variance = gain[-1] ** 2 + np.sum(np.asarray(sigma_of(s), np.float64)[2:] ** 2 * gain[1:-1] ** 2)
    assert variance == pytest.approx(expected, rel=1e-6)


def test_moments_of_sampled_gaussian_data():
    """40,000 samples of make_sample_fn have the mean and the variance of the closed form."""
    s = schedule.ho_linear(200, start=0.1 / 200, end=20 / 200)
    sample_fn = sampling.make_sample_fn(
        lambda variables, x, t: optimal(s, variables["params"], 0.5)(x, t), s, schedule.sigma_beta(s), (400, 10, 10, 1)
    )
    x = sample_fn(0.3, jax.random.key(3))
    gain = gains(s, 0.5)
    variance = gain[-1] ** 2 + np.sum(np.asarray(s.beta)[2:] ** 2 * gain[1:-1] ** 2)
    mean = 0.3 * (1 - s.alpha_bar[-1] * gain[-1])
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * np.sqrt(variance / x.size))
    assert float(x.var()) == pytest.approx(variance, rel=4 * np.sqrt(2 / x.size))


# ---------------------------------------------------------------- sample_fn


@pytest.mark.parametrize("rng", [jax.random.key(5), jax.random.PRNGKey(5)], ids=["typed", "raw"])
def test_image_keys_fold_in_the_index(rng):
    indices = np.array([3, 0, 7])
    expected = jnp.stack([jax.random.fold_in(rng, i) for i in (3, 0, 7)])
    for actual in (sampling.image_keys(rng, indices), jax.jit(sampling.image_keys)(rng, indices)):
        assert actual.dtype == rng.dtype
        np.testing.assert_array_equal(*map(jax.random.key_data, (actual, expected)))


KEY5 = jax.random.key(5)


def apply(variables, x, t):
    return network(x, t) * variables["params"]


def sampler(s, num, clip=None):
    return sampling.make_sample_fn(apply, s, schedule.sigma_beta(s), (num, 2, 2, 1), clip)


@pytest.mark.parametrize("rng", [jax.random.key(5), jax.random.PRNGKey(5)], ids=["typed", "raw"])
def test_image_i_depends_on_the_key_and_i_alone(rough, rng):
    images = sampler(rough, 8)(1.0, rng)
    assert images.shape == (8, 2, 2, 1) and images.dtype == jnp.float32
    for num in (1, 3, 5):
        np.testing.assert_array_equal(sampler(rough, num)(1.0, rng), images[:num])
    np.testing.assert_array_equal(sampler(rough, 3)(1.0, rng, 5), images[5:])
    assert len(np.unique(images)) == images.size


def test_images_are_numbered_by_32_bits(rough):
    sample_fn = sampler(rough, 3)
    last = sample_fn(1.0, jax.random.key(5), 2**32 - 3)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(5), np.uint32(2**32 - 3 + i)) for i in range(3)])
    np.testing.assert_array_equal(
        jax.random.key_data(sampling.image_keys(jax.random.key(5), sampling.image_numbers(2**32 - 3, 3))),
        jax.random.key_data(keys),
    )
    assert not (last == sample_fn(1.0, jax.random.key(5))).any()
    np.testing.assert_array_equal(sample_fn(1.0, jax.random.key(5), jnp.int32(2)), sampler(rough, 5)(1.0, KEY5)[2:])
    for first in (-1, 2**32 - 2, 2**32, 2**63, 2**64, 1.5, "0", [0]):
        with pytest.raises(ValueError, match=r"first=.* must be an integer in 0\.\.4294967293"):
            sample_fn(1.0, jax.random.key(5), first)
    for indices in (3, [-1], [2**32], [0.0]):
        with pytest.raises(ValueError, match=r"indices=.* must be a vector of integers in"):
            sampling.image_keys(jax.random.key(5), indices)
    with pytest.raises(ValueError, match=r"shape=\[0 2 2 1\] must be"):
        sampler(rough, 0)


def test_double_precision_changes_no_sample(rough):
    """With JAX_ENABLE_X64 noise without a dtype would be other numbers."""
    images = sampler(rough, 4)(1.0, jax.random.key(5))
    noise = sampling.normal(KEYS, 3, (2, 2, 1))
    with jax.enable_x64(True):
        wide = sampler(rough, 4)(1.0, jax.random.key(5))
        np.testing.assert_array_equal(sampling.normal(KEYS, 3, (2, 2, 1)), noise, strict=True)
        for chain in (
            lambda: sampling.reverse_chain(network, rough, np.full(5, 0.1), X, KEYS),
            lambda: sampling.dpmpp_2m_chain(network, rough, [4, 2, 0], X),
            lambda: sampling.dpmpp_2m_chain(network, rough, [4, 2, 0], X, keys=KEYS, eta=np.float64(0.5)),
            lambda: sampling.ddim_chain(network, rough, [4, 2, 0], X, KEYS, np.float64(0.5)),
        ):
            assert jax.eval_shape(chain) == jax.ShapeDtypeStruct(X.shape, np.float32)
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide, images, atol=1e-6)


def test_sample_fn_is_the_chain_from_its_latent(rough):
    rng = jax.random.key(5)
    keys = jnp.stack([jax.random.fold_in(rng, i) for i in range(3)])
    latent = jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), (2, 2, 1)) for key in keys])
    chain = sampling.reverse_chain(network, rough, rough.beta, latent, keys)
    np.testing.assert_allclose(sampler(rough, 3)(1.0, rng), chain, rtol=1e-6, atol=1e-6)


def test_sample_fn_is_traced_once(rough):
    traces = []

    def recording_apply(variables, x, t):
        traces.append(x.shape)
        return apply(variables, x, t)

    sample_fn = sampling.make_sample_fn(recording_apply, rough, rough.beta, (4, 2, 2, 1))
    for seed in range(3):
        sample_fn(np.float32(seed), jax.random.key(seed), seed)
    assert traces == [(1, 2, 2, 1)]  # one image per device, all four steps in one loop


def test_clip_reaches_the_chain(rough):
    assert float(abs(sampler(rough, 4, clip=(-0.1, 0.1))(5.0, jax.random.key(0))).max()) == np.float32(0.1)


def test_the_program_is_the_same_for_every_number_of_steps():
    """T = 10 and T = 1000 compile to the same instructions: steps are a loop and the schedule is an argument."""

    def instructions(num_steps):
        s = schedule.ho_linear(num_steps)
        chain = jax.jit(lambda s, sigma, x: sampling.reverse_chain(network, s, sigma, x, KEYS))
        text = chain.lower(s, s.beta, X).compile().as_text()
        return re.findall(r"= \S+ ([a-z-]+)\(", text)

    assert len(instructions(10)) > 20
    assert instructions(10) == instructions(1000)


def test_a_window_reports_once_per_device_and_changes_no_bit(rough):
    steps = []
    window = sampling.Window(lambda t: steps.append(int(t)), every=2)
    sample_fn = sampling.make_sample_fn(apply, rough, rough.beta, (8, 2, 2, 1), window=window)
    images = sample_fn(1.0, jax.random.key(5))
    jax.effects_barrier()
    assert sorted(steps) == [0] * 4 + [2] * 4
    np.testing.assert_array_equal(images, sampler(rough, 8)(1.0, jax.random.key(5)))


def test_a_prediction_without_more_is_the_array(rough):
    def prediction_fn(x, t):
        return process.Prediction(network(x, t))

    for clip in (None, (-1.0, 1.0)):
        chain = [
            sampling.reverse_chain(fn, rough, schedule.sigma_beta(rough), X, KEYS, clip=clip)
            for fn in (network, prediction_fn)
        ]
        np.testing.assert_array_equal(*chain)


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_the_networks_own_deviation_and_x_0_replace_those_of_the_chain(rough, clip):
    """A prediction with x_0 of its ε̄ and a σ for each entry is the chain with that σ."""
    sigma, mask = (
        np.array([9.0, 9.0, 0.2, 0.3, 0.4], np.float32),
        np.array([[[1.0], [0.0]], [[1.0], [1.0]]], np.float32),
    )

    def prediction_fn(x, t):
        eps_bar = network(x, t)
        x_0 = jax.vmap(lambda *args: process.predict_x_0(rough, *args))(x, t, eps_bar)
        return process.Prediction(eps_bar, x_0, jax.vmap(lambda t: jnp.asarray(sigma)[t] * mask)(t))

    def masked(sigma, mask):
        x = X
        for t in (4, 3, 2, 1):
            of = network, rough, np.zeros(5), x, KEYS, np.int32(t), clip
            x = sampling.ancestral_step(*of)[0] + (
                sigma[t] * mask * np.asarray(sampling.normal(KEYS, t, X.shape[1:])) if t > 1 else 0
            )
        return x

    actual = sampling.reverse_chain(prediction_fn, rough, np.full(5, 7.0), X, KEYS, clip=clip)
    np.testing.assert_allclose(actual, masked(sigma, mask), rtol=1e-5, atol=1e-5)


def test_guidance_of_predictions(rough):
    """ε̄ and x_0 are guided, the deviation is the conditional one."""

    def of(number):
        return lambda x, t: process.Prediction(x * number, x + number, jnp.full(x.shape, number))

    found = sampling.guided(of(2.0), of(1.0), 3.0)(X, np.full(3, 2))
    np.testing.assert_allclose(found.eps_bar, 4 * X, rtol=1e-6)
    np.testing.assert_allclose(found.x_0, X + 4, rtol=1e-6)
    assert (found.sigma == 2.0).all()


def gaussian_velocity(s, deviation):
    """Returns the optimal prediction for data N(0, deviation²), with x_0, and the variances of x_t."""
    v = np.asarray(s.alpha_bar) ** 2 * deviation**2 + np.asarray(s.beta_bar) ** 2

    def prediction_fn(x, t):
        def one(x, t):
            return process.Prediction(s.beta_bar[t] * x / v[t], s.alpha_bar[t] * deviation**2 * x / v[t])

        return jax.vmap(one)(x, t)

    v = jnp.asarray(v)
    return prediction_fn, v


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_analytic_chain_has_every_variance_of_the_forward_process(rough, is_terminal):
    """On Gaussian data, from x_T of the right variance: gain² v_t + σ_t² = v_{t−1}, at each t."""
    s = schedule.zero_terminal(rough) if is_terminal else rough
    prediction_fn, v = gaussian_velocity(s, 0.7)
    mean_square = s.beta_bar**2 / v
    sigma = schedule.sigma_analytic(s, mean_square)
    if is_terminal:  # x_T tells nothing of x_0, whose variance is not 1 but 0.49
        sigma = sigma.at[4].set(jnp.sqrt(v[3]))
    ones = np.ones_like(X)
    for t in (4, 3, 2):
        gain = sampling.ancestral_step(prediction_fn, s, np.zeros(5), ones, KEYS, np.int32(t))[0]
        np.testing.assert_allclose(gain**2 * v[t] + sigma[t] ** 2, np.full(X.shape, v[t - 1]), rtol=1e-5)


def test_the_chain_from_pure_noise_at_a_zero_terminal(rough):
    """With ᾱ_T = 0 the greedy chain returns the mean of Gaussian data, and the fast chains return finite samples."""
    s = schedule.zero_terminal(rough)
    prediction_fn, _ = gaussian_velocity(s, 0.7)
    x = sampling.reverse_chain(prediction_fn, s, schedule.sigma_zero(s), np.ones_like(X), KEYS)
    assert (x == 0).all()  # E[x_0 | x_T] of pure noise
    for chain in (
        sampling.ddim_chain(prediction_fn, s, [4, 2, 1, 0], np.ones_like(X), KEYS),
        sampling.dpmpp_2m_chain(prediction_fn, s, [4, 2, 1, 0], np.ones_like(X)),
    ):
        assert np.isfinite(chain).all() and (chain > 0).all()
