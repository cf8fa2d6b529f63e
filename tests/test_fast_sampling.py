"""DDIM, DPM-Solver++(2M), their grids, and windows: identities on four rough steps, Gaussian data in closed form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import process, sampling, schedule, unet

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(1).standard_normal((3, 2, 2, 1)).astype(np.float32)
GRIDS = (sampling.grid_uniform, sampling.grid_quadratic, sampling.grid_log_snr)
S = schedule.ho_linear(20)


def network(x, t):
    """A stand-in for the network: different at each t and at each pixel."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1


def optimal(s, mean, deviation):
    """Returns the optimal network for data N(mean, deviation²) and the variances v of x_t."""
    v = np.asarray(s.alpha_bar) ** 2 * deviation**2 + np.asarray(s.beta_bar) ** 2

    def eps_bar_fn(x, t):
        return jax.vmap(lambda x, t: s.beta_bar[t] * (x - s.alpha_bar[t] * mean) / jnp.asarray(v)[t])(x, t)

    return eps_bar_fn, v


# ---------------------------------------------------------------- DDIM


@pytest.mark.parametrize("clip", [None, (-0.5, 0.75)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_a_loop_over_its_formula(rough, eta, clip):
    x = X.copy().astype(np.float64)
    a, b = np.asarray(rough.alpha_bar, np.float64), np.asarray(rough.beta_bar, np.float64)
    for t, u in ((4, 3), (3, 1), (1, 0)):
        eps_bar = np.asarray(network(x, np.full(3, t)), np.float64)
        x_0 = (x - b[t] * eps_bar) / a[t]
        if clip:
            x_0 = np.clip(x_0, *clip)
            eps_bar = (x - a[t] * x_0) / b[t]
        deviation = eta * b[u] / b[t] * np.sqrt(1 - (a[t] / a[u]) ** 2)
        z = np.asarray(sampling.normal(KEYS, t, X.shape[1:]))
        x = a[u] * x_0 + np.sqrt(b[u] ** 2 - deviation**2) * eps_bar + deviation * z
    actual = sampling.ddim_chain(network, rough, [4, 3, 1, 0], X, KEYS, eta, clip)
    np.testing.assert_allclose(actual, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_ddim_with_eta_1_over_all_steps_is_the_posterior_sampler(rough, clip):
    for s in (rough, schedule.ho_linear(50)):
        ancestral = sampling.reverse_chain(network, s, schedule.sigma_posterior(s), X, KEYS, clip=clip)
        ddim = sampling.ddim_chain(network, s, sampling.grid_uniform(s, s.num_steps), X, KEYS, 1.0, clip)
        np.testing.assert_allclose(ddim, ancestral, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_composes_bit_for_bit(rough, eta):
    def chain(x, ts):
        return sampling.ddim_chain(network, rough, ts, x, KEYS, eta, (-1.0, 1.0))

    whole = chain(X, [4, 3, 2, 0])
    np.testing.assert_array_equal(chain(chain(X, [4, 3]), [3, 2, 0]), whole)
    np.testing.assert_array_equal(chain(chain(X, [4, 3, 2]), [2, 0]), whole)


def test_ddim_caps_the_noise_at_the_whole_variance(rough):
    """A large eta makes the direction all noise, and nothing is NaN."""
    x = sampling.ddim_chain(network, rough, [3, 2], X, KEYS, 100.0)
    x_0 = process.predict_x_0(rough, X, 3, network(X, np.full(3, 3)))
    z = sampling.normal(KEYS, 3, X.shape[1:])
    np.testing.assert_allclose(x, rough.alpha_bar[2] * x_0 + rough.beta_bar[2] * z, rtol=1e-5, atol=1e-5)


def test_ddim_gain_on_gaussian_data(rough):
    """A step from t to u multiplies x − ᾱ_t m by (ᾱ_u ᾱ_t s² + β̄_u β̄_t)/v_t and adds ᾱ_u m."""
    mean, deviation = 0.3, 0.5
    eps_bar_fn, v = optimal(rough, mean, deviation)
    a, b = rough.alpha_bar, rough.beta_bar
    for t, u in ((4, 1), (3, 2), (2, 0)):
        gain = (a[u] * a[t] * deviation**2 + b[u] * b[t]) / v[t]
        actual = sampling.ddim_chain(eps_bar_fn, rough, [t, u], X, KEYS)
        np.testing.assert_allclose(actual, a[u] * mean + gain * (X - a[t] * mean), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- DPM-Solver++(2M)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpmpp_2m_is_a_loop_over_its_formula(rough, eta):
    a, b = np.asarray(rough.alpha_bar, np.float64), np.asarray(rough.beta_bar, np.float64)
    x, before = X.astype(np.float64), None
    for t, u in ((4, 3), (3, 2), (2, 1), (1, 0)):
        x_0 = (x - b[t] * np.asarray(network(x, np.full(3, t)))) / a[t]
        if u == 0:
            x = x_0
            break
        h = np.log(a[u] / b[u]) - np.log(a[t] / b[t])
        r = None if before is None else before[1] / h
        blend = x_0 if before is None else (1 + 1 / (2 * r)) * x_0 - before[0] / (2 * r)
        noise = b[u] * np.sqrt(1 - np.exp(-2 * eta * h)) * np.asarray(sampling.normal(KEYS, t, X.shape[1:]))
        x = b[u] / b[t] * np.exp(-eta * h) * x + a[u] * (1 - np.exp(-(1 + eta) * h)) * blend + noise
        before = x_0, h
    actual = sampling.dpmpp_2m_chain(network, rough, [4, 3, 2, 1, 0], X, keys=KEYS, eta=eta)
    np.testing.assert_allclose(actual, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_dpmpp_2m_step_is_ddim_and_the_last_returns_x_0(rough, eta):
    """With η = 0 and 1, and the same noise. Between them the two have other variances."""
    for ts in ([4, 2], [4, 3], [3, 0]):
        one = sampling.dpmpp_2m_chain(network, rough, ts, X, clip=(-0.5, 0.75), keys=KEYS, eta=eta)
        ddim = sampling.ddim_chain(network, rough, ts, X, KEYS, eta, clip=(-0.5, 0.75))
        np.testing.assert_allclose(one, ddim, rtol=1e-5, atol=1e-6)
    assert one.min() == -0.5 and one.max() == 0.75


def test_dpmpp_2m_without_noise_draws_none(rough):
    """At a known η = 0 the program has no random numbers and needs no keys; at a traced 0 their scale is 0."""

    def chain(x, **noise):
        return sampling.dpmpp_2m_chain(network, rough, [4, 3, 1, 0], x, **noise)

    program = str(jax.make_jaxpr(chain)(X))
    assert "random" not in program and program == str(jax.make_jaxpr(lambda x: chain(x, keys=KEYS, eta=0))(X))
    assert "random" in str(jax.make_jaxpr(lambda x: chain(x, keys=KEYS, eta=1))(X))
    for eta in (0.0, 0.6):
        traced = jax.jit(lambda x, eta: chain(x, keys=KEYS, eta=eta))(X, eta)
        np.testing.assert_allclose(traced, chain(X, keys=KEYS, eta=eta), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"keys has shape \(\): it must hold one key for each of the 3 examples"):
        chain(X, eta=1.0)


@pytest.mark.parametrize("eta", [0.5, 1e30])
def test_dpmpp_2m_noise_is_finite_at_every_step(rough, eta):
    """Also where rounding makes a step in λ negative, and where it is infinite."""
    below = np.nextafter(rough.beta_bar[2], np.float32(0))
    flat = rough._replace(
        alpha_bar=rough.alpha_bar.at[3].set(rough.alpha_bar[2]), beta_bar=rough.beta_bar.at[3].set(below)
    )
    assert np.log(below) < np.log(flat.beta_bar[2])
    x = sampling.dpmpp_2m_chain(network, flat, [3, 2], X, keys=KEYS, eta=eta)
    np.testing.assert_allclose(x, X, rtol=1e-5)
    s = schedule.zero_terminal(rough)
    predict = lambda x, t: process.Prediction(x, jnp.tanh(x))  # noqa: E731
    x = sampling.dpmpp_2m_chain(predict, s, [4, 2], X, keys=KEYS, eta=eta)
    noise = sampling.normal(KEYS, 4, X.shape[1:])
    np.testing.assert_allclose(x, s.alpha_bar[2] * np.tanh(X) + s.beta_bar[2] * noise, rtol=1e-5, atol=1e-6)
    of_zero = jax.jit(lambda eta: sampling.dpmpp_2m_chain(predict, s, [4, 2, 1, 0], X, keys=KEYS, eta=eta))(0.0)
    np.testing.assert_allclose(of_zero, sampling.dpmpp_2m_chain(predict, s, [4, 2, 1, 0], X), rtol=1e-5, atol=1e-6)


def equal_steps():
    """Returns a schedule with λ falling from 4 to −4 in equal steps."""
    log_snr = np.linspace(4, -4, 256 * 8)
    alpha_bar_squared = 1 / (1 + np.exp(-2 * log_snr))
    return schedule.from_beta_squared(1 - alpha_bar_squared / np.concatenate([[1.0], alpha_bar_squared[:-1]]))


def test_order_of_convergence():
    """Errors against the exact path √(v_u/v_t) of Gaussian data, for grids of n equal steps in λ, fall as n^−order."""
    s = equal_steps()
    eps_bar_fn, v = optimal(s, 0.0, 0.5)
    t, u = s.num_steps, 1
    exact = np.sqrt(v[u] / v[t]) * X
    chains = {1: lambda ts: sampling.ddim_chain(eps_bar_fn, s, ts, X, KEYS)}
    chains[2] = lambda ts: sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, X)
    for order, chain in chains.items():
        errors = []
        for n in (8, 16, 32):
            ts = np.rint(np.linspace(t, u, n + 1)).astype(int)
            errors.append(np.abs(np.asarray(chain(ts)) - exact).max())
        slopes = np.log2(np.array(errors[:-1]) / errors[1:])
        assert slopes[-1] == pytest.approx(order, abs=0.2), (order, errors)


MOMENTS = {
    "dpmpp_2m, eta = 0.5": (2, lambda *args: sampling.dpmpp_2m_chain(*args[:-1], keys=args[-1], eta=0.5)),
    "dpmpp_2m, eta = 1": (2, lambda *args: sampling.dpmpp_2m_chain(*args[:-1], keys=args[-1], eta=1.0)),
    "ddim, eta = 1": (1, lambda *args: sampling.ddim_chain(*args, 1.0)),
}


@pytest.mark.parametrize("order, chain", MOMENTS.values(), ids=MOMENTS)
def test_order_of_the_variance_of_random_chains(monkeypatch, order, chain):
    """On Gaussian data a chain is linear: responses to x_T and to the noise of each step give its moments."""
    s, mean, deviation = equal_steps(), 0.3, 0.5
    eps_bar_fn, v = optimal(s, mean, deviation)
    monkeypatch.setattr(sampling, "normal", lambda keys, t, shape: (keys == t).astype(jnp.float32).reshape(-1, *shape))
    start, stop, errors = s.num_steps, 1, []
    for n in (32, 64):
        ts = np.rint(np.linspace(start, stop, n + 1)).astype(int)
        x = np.full((n + 2, 1), s.alpha_bar[start] * mean)
        x[1] += 1
        x = chain(eps_bar_fn, s, ts, x, np.array([0, 0, *ts[:-1]]))[:, 0]
        np.testing.assert_allclose(x[0], s.alpha_bar[stop] * mean, rtol=1e-5)
        gain, *noise = np.asarray(x[1:] - x[0], np.float64)
        errors.append(abs(gain**2 * v[start] + np.sum(np.square(noise)) - v[stop]))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), errors
    assert errors[1] < (0.04 if order == 1 else 0.002), errors


# ---------------------------------------------------------------- grids and independence


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_t_to_0(grid):
    for s in (schedule.su_linear(1000), schedule.cosine(100), schedule.ho_linear(7)):
        for n in (1, 2, 5, 7, s.num_steps // 2, s.num_steps - 1, s.num_steps):
            if n < 1:
                continue
            ts = grid(s, n)
            assert ts.shape == (n + 1,) and ts[0] == s.num_steps and ts[-1] == 0
            assert (np.diff(ts) < 0).all()
        for n in (0, s.num_steps + 1, -1, 2.5):
            with pytest.raises(ValueError, match=rf"n={n} must be an integer in 1\.\.{s.num_steps}"):
                grid(s, n)


def test_spacing_of_the_grids():
    s = schedule.ho_linear(1000)
    assert sampling.grid_uniform(s, 4).tolist() == [1000, 750, 500, 250, 0]
    assert sampling.grid_quadratic(s, 4).tolist() == [1000, 562, 250, 62, 0]
    ts = sampling.grid_log_snr(s, 11)
    steps = np.diff(np.log(np.asarray(s.alpha_bar, float)[ts[:-1]] / np.asarray(s.beta_bar, float)[ts[:-1]]))
    assert ts[-2] == 1
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.15)


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
@pytest.mark.parametrize(
    "ts, message",
    [
        ([4], r"ts=\[4\] must fall from at most T=4 to at least 0, in at least one step"),
        ([[4, 0]], r"ts=\[\[4 0\]\] must be a vector of integers in 0\.\.4"),
        ([4.0, 0.0], r"ts=\[4\. 0\.\] must be a vector of integers"),
        ([3, 3, 0], r"ts=\[3 3 0\] must fall from at most T=4 to at least 0"),
        ([5, 0], r"ts=\[5 0\] must be a vector of integers in 0\.\.4"),
        ([2, -1], r"ts=\[ 2 -1\] must be"),
        ([0, 4], r"ts=\[0 4\] must fall"),
    ],
)
def test_grids_that_do_not_fall_are_rejected(rough, ts, message, kind):
    with pytest.raises(ValueError, match=message):
        sampling.ddim_chain(network, rough, kind(ts), X, KEYS)
    with pytest.raises(ValueError, match=message):
        sampling.dpmpp_2m_chain(network, rough, kind(ts), X)


TRACED = {
    "ddim": lambda ts, x: sampling.ddim_chain(network, S, ts, x, KEYS, 0.5, (-1.0, 1.0)),
    "dpmpp_2m": lambda ts, x: sampling.dpmpp_2m_chain(network, S, ts, x),
    "dpmpp_2m, eta = 1": lambda ts, x: sampling.dpmpp_2m_chain(network, S, ts, x, keys=KEYS, eta=1.0),
}


@pytest.mark.parametrize("chain", TRACED.values(), ids=TRACED)
def test_a_traced_grid_gives_the_bits_of_the_concrete_grid(chain):
    traces = []

    @jax.jit
    def traced(ts, x):
        traces.append(ts)
        return chain(ts, x)

    for grid in GRIDS:
        ts = grid(S, 4)
        concrete = jax.jit(lambda x, ts=ts: chain(ts, x))(X)
        np.testing.assert_array_equal(traced(ts, X), concrete)
        np.testing.assert_array_equal(jax.jit(lambda x, ts=ts: chain(jnp.asarray(ts), x))(X), concrete)
    assert len(traces) == 1  # one program for every grid of 4 steps
    with pytest.raises(ValueError, match=r"ts=.* must fall .* in at least one step"):
        traced(np.array([4]), X)
    with pytest.raises(ValueError, match=r"ts=.* must be a vector of integers"):
        traced(np.array([4.0, 0.0]), X)


@pytest.mark.parametrize("chain", TRACED.values(), ids=TRACED)
def test_a_grid_may_be_made_inside_a_program(chain):
    expected = jax.jit(lambda x: chain(np.array([20, 10, 0]), x))(X)
    for grid in (lambda t: jnp.arange(20, -1, -10), lambda t: t - jnp.array([0, 10, 20]), lambda t: [t, 10, 0]):
        np.testing.assert_array_equal(jax.jit(lambda t, x, grid=grid: chain(grid(t), x))(20, X), expected)


@pytest.mark.parametrize("eta", [-0.1, np.nan, np.inf])
def test_an_eta_that_is_no_scale_is_rejected(rough, eta):
    with pytest.raises(ValueError, match=f"eta={eta} must be a number >= 0"):
        sampling.ddim_chain(network, rough, [4, 0], X, KEYS, eta)
    with pytest.raises(ValueError, match=f"eta={eta} must be a number >= 0"):
        sampling.dpmpp_2m_chain(network, rough, [4, 0], X, keys=KEYS, eta=eta)


def test_an_image_does_not_depend_on_its_batch(rough):
    for chain in (
        lambda x, keys: sampling.ddim_chain(network, rough, [4, 2, 0], x, keys, 0.7),
        lambda x, keys: sampling.dpmpp_2m_chain(network, rough, [4, 2, 0], x),
        lambda x, keys: sampling.dpmpp_2m_chain(network, rough, [4, 2, 1, 0], x, keys=keys, eta=1.0),
    ):
        np.testing.assert_array_equal(chain(X[1:2], KEYS[1:2])[0], chain(X, KEYS)[1])


# ---------------------------------------------------------------- windows


def chains(s):
    """Returns {name: chain(x, start, stop=0, window=None)} of the three chains."""
    sigma, grid = schedule.sigma_beta(s), sampling.grid_uniform(s, 10)

    def ts(start, stop):
        return grid[(grid <= start) & (grid >= stop)]

    return {
        "ancestral": lambda x, start, stop=0, window=None: sampling.reverse_chain(
            network, s, sigma, x, KEYS, start, stop, clip=(-1.0, 1.0), window=window
        ),
        "ddim": lambda x, start, stop=0, window=None: sampling.ddim_chain(
            network, s, ts(start, stop), x, KEYS, 0.5, window=window
        ),
        "dpmpp_2m": lambda x, start, stop=0, window=None: sampling.dpmpp_2m_chain(
            network, s, ts(start, stop), x, window=window
        ),
    }


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpmpp_2m"])
def test_a_window_observes_every_kth_step_and_changes_no_bit(name):
    chain, reports = chains(S)[name], {}

    def report(t, states):
        reports[int(t)] = [np.asarray(x) for x in states]
        return True  # the chain ignores it

    window = sampling.Window(report, every=4, look=lambda x_t, x_0: (x_t, x_0))
    x = jax.jit(lambda x: chain(x, 20, window=window))(X)
    jax.effects_barrier()
    np.testing.assert_array_equal(x, jax.jit(lambda x: chain(x, 20))(X))
    assert sorted(reports) == ([0, 4, 8, 12, 16] if name == "ancestral" else [4, 12])
    for t, (x_t, _) in reports.items():
        np.testing.assert_array_equal(x_t, chain(X, 20, t))
    if name == "ancestral":
        x_17 = chain(X, 20, 17)
        x_0 = np.clip(process.predict_x_0(S, x_17, 17, network(x_17, np.full(3, 17))), -1, 1)
        np.testing.assert_allclose(reports[16][1], x_0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_a_chain_cut_to_stop_early_continues_bit_for_bit(name):
    """The host decides between two parts of a chain, after the window of the first."""
    chain, steps = chains(S)[name], []
    window = sampling.Window(lambda t: steps.append(int(t)))
    x_8 = chain(X, 20, 8, window)
    jax.effects_barrier()
    assert min(steps) == 8
    np.testing.assert_array_equal(chain(x_8, 8, 0, window), chain(X, 20))


@pytest.mark.slow
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_a_window_changes_no_bit_of_a_real_network(clip):
    """XLA may round convolutions, attention and constants differently in a different program."""
    model = unet.UNet(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=8)
    s = schedule.ho_linear(1000)
    keys = jax.random.split(jax.random.key(0), 4)
    x = sampling.normal(keys, sampling.LATENT, (8, 8, 1))
    shapes, rng = jax.eval_shape(model.init, jax.random.key(1), x, jnp.ones(4, jnp.int32)), np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(float(p.ndim == 1), 0.1, p.shape).astype(np.float32), shapes)

    def eps_bar_fn(x, t):
        return model.apply(params, x, t)

    @functools.partial(jax.jit, static_argnames="window")
    def chain(x, window=None):
        sigma = schedule.sigma_beta(s)
        return sampling.reverse_chain(eps_bar_fn, s, sigma, x, keys, 100, clip=clip, window=window)

    steps = []
    observed = chain(x, sampling.Window(lambda t, x_0: steps.append(int(t)), every=20, look=lambda x_t, x_0: x_0))
    jax.effects_barrier()
    assert sorted(steps) == [0, 20, 40, 60, 80]
    np.testing.assert_array_equal(observed, chain(x))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_ddim_keeps_every_variance_of_the_grid(rough, eta):
    """On Gaussian data a step of any length and eta from variance v_t has v_u, and the last adds no noise."""
    eps_bar_fn, v = optimal(rough, 0.0, 0.7)
    mean_square = np.asarray(rough.beta_bar) ** 2 / v
    noise = sampling.normal(KEYS, 4, X.shape[1:])
    for t, u in ((4, 1), (4, 2), (4, 0)):
        zero, one = (
            sampling.ddim_chain(eps_bar_fn, rough, [t, u], x, KEYS, eta, mean_square=mean_square)
            for x in (np.zeros_like(X), np.ones_like(X))
        )
        gain, deviation = one - zero, zero / noise
        if u == 0:
            assert (zero == 0).all()
        else:
            np.testing.assert_allclose(gain**2 * v[t] + deviation**2, np.full(X.shape, v[u]), rtol=2e-4)


@pytest.mark.parametrize("smallest", [-1, -3, -5, -7])
@pytest.mark.parametrize("start", [1e-5, 1e-3, 0.01])
def test_grid_by_bound_is_the_best_of_all_grids(smallest, start):
    """With small errors the step to 0 costs nothing, and with a small β_1 the other steps cost much."""
    s = schedule.ho_linear(12, start, 0.4)
    error = np.random.default_rng(0).uniform(0.5, 1, 13) * np.logspace(smallest, 0, 13)
    ratio = np.asarray(s.alpha_bar[1:], np.float64) ** 2 / np.asarray(s.beta_bar[1:], np.float64) ** 2

    def cost(ts):
        steps = [0.5 * (ratio[u - 1] - ratio[t - 1]) * error[t] for t, u in itertools.pairwise(ts[:-1])]
        return sum(steps) + max(0.5 * np.log(2 * np.pi * np.e * error[ts[-2]]) - np.log(2 / 255), 0)

    for n in (1, 2, 4, 7, 12):
        every = [(12, *middle[::-1], 0) for middle in itertools.combinations(range(1, 12), n - 1)]
        np.testing.assert_array_equal(sampling.grid_by_bound(s, error, n), min(every, key=cost))


@pytest.mark.parametrize("error", [np.ones(12), np.zeros(13), np.full(13, np.nan)])
def test_grid_by_bound_needs_an_error_of_each_step(error):
    with pytest.raises(ValueError, match=r"squared_error has shape"):
        sampling.grid_by_bound(schedule.ho_linear(12), error, 3)


def test_a_grid_in_log_snr_of_a_zero_terminal_schedule():
    s = schedule.zero_terminal(schedule.ho_linear(50))
    grid = sampling.grid_log_snr(s, 6)
    assert grid[0] == 50 and grid[-1] == 0 and (np.diff(grid) < 0).all()
    log_snr = np.log(s.alpha_bar[grid[1:-1]] / s.beta_bar[grid[1:-1]])
    assert np.ptp(np.diff(log_snr)) < 0.5  # equal but for rounding to whole steps
