"""DDIM, DPM-Solver++(2M) and their grids: identities on four rough steps, then Gaussian data in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import process, sampling, schedule, unet

KEYS = jax.random.split(jax.random.key(0), 3)
X = np.random.default_rng(1).standard_normal((3, 2, 2, 1)).astype(np.float32)
GRIDS = (sampling.grid_uniform, sampling.grid_quadratic, sampling.grid_log_snr)


def network(x, t):
    """Any function, different at each t and for each pixel."""
    return jnp.tanh(x) * t[:, None, None, None] / 4 - 0.1


def optimal(s, mean, deviation):
    """The best prediction of ε̄ for data N(mean, deviation²)."""
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


def test_ddim_with_more_noise_than_there_is_room_for(rough):
    """eta beyond the whole variance: the direction is all noise, and nothing is NaN."""
    x = sampling.ddim_chain(network, rough, [3, 2], X, KEYS, 100.0)
    x_0 = process.predict_x_0(rough, X, 3, network(X, np.full(3, 3)))
    z = sampling.normal(KEYS, 3, X.shape[1:])
    np.testing.assert_allclose(x, rough.alpha_bar[2] * x_0 + rough.beta_bar[2] * z, rtol=1e-5, atol=1e-5)


def test_ddim_gain_on_gaussian_data(rough):
    """From t to u: (ᾱ_u ᾱ_t s² + β̄_u β̄_t)/v_t on x − ᾱ_t m, around ᾱ_u m."""
    mean, deviation = 0.3, 0.5
    eps_bar_fn, v = optimal(rough, mean, deviation)
    a, b = rough.alpha_bar, rough.beta_bar
    for t, u in ((4, 1), (3, 2), (2, 0)):
        gain = (a[u] * a[t] * deviation**2 + b[u] * b[t]) / v[t]
        actual = sampling.ddim_chain(eps_bar_fn, rough, [t, u], X, KEYS)
        np.testing.assert_allclose(actual, a[u] * mean + gain * (X - a[t] * mean), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- DPM-Solver++(2M)


def test_dpmpp_2m_is_a_loop_over_its_formula(rough):
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
        x, before = b[u] / b[t] * x - a[u] * (np.exp(-h) - 1) * blend, (x_0, h)
    np.testing.assert_allclose(sampling.dpmpp_2m_chain(network, rough, [4, 3, 2, 1, 0], X), x, rtol=1e-5, atol=1e-5)


def test_dpmpp_2m_of_one_step_is_ddim_and_the_last_returns_x_0(rough):
    for ts in ([4, 2], [3, 0]):
        one = sampling.dpmpp_2m_chain(network, rough, ts, X, clip=(-0.5, 0.75))
        ddim = sampling.ddim_chain(network, rough, ts, X, KEYS, clip=(-0.5, 0.75))
        np.testing.assert_allclose(one, ddim, rtol=1e-5, atol=1e-6)
    assert one.min() == -0.5 and one.max() == 0.75


def test_order_of_convergence():
    """On Gaussian data the exact path is √(v_u/v_t) around the mean; error against the number of equal steps in λ."""
    log_snr = np.linspace(4, -4, 256 * 8)
    alpha_bar_squared = 1 / (1 + np.exp(-2 * log_snr))
    s = schedule.from_beta_squared(1 - alpha_bar_squared / np.concatenate([[1.0], alpha_bar_squared[:-1]]))
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
        with pytest.raises(ValueError, match=f"a grid of {s.num_steps + 1} steps"):
            grid(s, s.num_steps + 1)
        with pytest.raises(ValueError, match="at least 1 step"):
            grid(s, 0)


def test_what_the_grids_space():
    s = schedule.ho_linear(1000)
    assert sampling.grid_uniform(s, 4).tolist() == [1000, 750, 500, 250, 0]
    assert sampling.grid_quadratic(s, 4).tolist() == [1000, 562, 250, 62, 0]
    ts = sampling.grid_log_snr(s, 11)
    steps = np.diff(np.log(np.asarray(s.alpha_bar, float)[ts[:-1]] / np.asarray(s.beta_bar, float)[ts[:-1]]))
    assert ts[-2] == 1
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.15)


@pytest.mark.parametrize("ts", [[4], [3, 3, 0], [5, 0], [2, -1], [0, 4], [[4, 0]]])
def test_what_is_no_grid(rough, ts):
    with pytest.raises(ValueError, match="must fall from at most T=4"):
        sampling.ddim_chain(network, rough, ts, X, KEYS)
    with pytest.raises(ValueError, match="must fall from at most T=4"):
        sampling.dpmpp_2m_chain(network, rough, ts, X)


def test_an_image_does_not_depend_on_its_batch(rough):
    for chain in (
        lambda x, keys: sampling.ddim_chain(network, rough, [4, 2, 0], x, keys, 0.7),
        lambda x, keys: sampling.dpmpp_2m_chain(network, rough, [4, 2, 0], x),
    ):
        np.testing.assert_array_equal(chain(X[1:2], KEYS[1:2])[0], chain(X, KEYS)[1])


# ---------------------------------------------------------------- what the network predicts


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


# ---------------------------------------------------------------- a window into the chain


def chains(s):
    """Each chain from its first to its last step, and from a step it was stopped at."""
    sigma, ts = schedule.sigma_beta(s), sampling.grid_uniform(s, 10)

    def rest(t):
        return ts[list(ts).index(t) :]

    return {
        "ancestral": lambda x, t, window=None: sampling.reverse_chain(
            network, s, sigma, x, KEYS, t, clip=(-1.0, 1.0), window=window
        ),
        "ddim": lambda x, t, window=None: sampling.ddim_chain(network, s, rest(t), x, KEYS, 0.5, window=window),
        "dpmpp_2m": lambda x, t, window=None: sampling.dpmpp_2m_chain(network, s, rest(t), x, window=window),
    }


S = schedule.ho_linear(20)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpmpp_2m"])
def test_a_window_sees_every_kth_step_and_changes_nothing(name):
    chain, seen = chains(S)[name], []

    def report(t, looked):
        seen.append((int(t), *map(np.asarray, looked)))

    window = sampling.Window(report, every=4, look=lambda x, x_0: (x, x_0))
    x, reached = jax.jit(lambda x: chain(x, 20, window))(X)
    jax.effects_barrier()
    np.testing.assert_array_equal(x, jax.jit(lambda x: chain(x, 20))(X))
    assert int(reached) == 0
    stops = [16, 12, 8, 4, 0] if name == "ancestral" else [12, 4]
    assert [t for t, *_ in seen] == stops
    if name == "ancestral":  # the states on the way are those of the chain cut there
        for t, state, _ in seen:
            cut = sampling.reverse_chain(network, S, schedule.sigma_beta(S), X, KEYS, 20, t, clip=(-1.0, 1.0))
            np.testing.assert_array_equal(state, cut)
            assert abs(seen[0][2]).max() <= 1


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpmpp_2m"])
def test_a_stopped_chain_goes_on_from_where_it_is(name):
    chain = chains(S)[name]
    window = sampling.Window(lambda t: t <= 8, every=2)
    x, t = jax.jit(lambda x: chain(x, 20, window))(X)
    assert int(t) == 8
    rest = jax.jit(lambda x: chain(x, 8))(x)
    if name != "dpmpp_2m":  # which forgets the step before
        np.testing.assert_array_equal(rest, jax.jit(lambda x: chain(x, 20))(X))


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_a_window_changes_nothing_of_a_real_network(clip):
    """Convolutions, attention and constants are where XLA would round otherwise."""
    model = unet.UNet(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=8)
    s = schedule.ho_linear(1000)
    keys = jax.random.split(jax.random.key(0), 4)
    x = sampling.normal(keys, sampling.LATENT, (8, 8, 1))
    params = model.init(jax.random.key(1), x, jnp.ones(4, jnp.int32))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)

    def chain(window=None):
        return jax.jit(
            lambda x: sampling.reverse_chain(
                lambda x, t: model.apply(params, x, t),
                s,
                schedule.sigma_beta(s),
                x,
                keys,
                100,
                clip=clip,
                window=window,
            )
        )(x)

    seen = []
    watched, t = chain(sampling.Window(lambda t, x_0: seen.append(t), every=20, look=lambda x, x_0: x_0))
    assert t == 0 and len(seen) == 5
    np.testing.assert_array_equal(watched, chain())
