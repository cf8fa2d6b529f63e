"""Weights, schedules and deviations through configs: what is built, what is refused, and a run from end to end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, tiny_config, write_random_run

import diffusion_jax
from diffusion_jax import losses, parts, process, schedule
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluate import evaluate
from diffusion_jax.interop.diffusers import export_diffusers, import_diffusers
from diffusion_jax.interop.export import export_again, export_sampler
from diffusion_jax.running import config as configs
from diffusion_jax.running import measured
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.sample import ema_params

LEARNED = {"model__learned_sigma": True, "train__loss": "hybrid", "sampling__sigma": "learned"}
X_0 = np.linspace(-1, 1, 2 * 8 * 8).reshape(2, 8, 8, 1).round(1).astype(np.float32)
T = np.array([1, 20])
KEYS = jax.random.split(jax.random.key(0), 2)


class Doubled:
    """Stands for a network with learned deviations: its outputs are functions of x and t."""

    @staticmethod
    def apply(variables, x, t, labels=None):
        return jnp.concatenate([jnp.tanh(x) * t[:, None, None, None] / 20, 0.3 * x], axis=-1)


def test_schedules_are_shifted_and_then_ended_at_0():
    config = tiny_config(schedule__log_snr_shift=-1.0, schedule__zero_terminal=True, model__prediction="velocity")
    expected = schedule.zero_terminal(schedule.shifted(schedule.su_linear(20), -1.0))
    assert_same(parts.schedule(config), expected)
    assert_same(parts.schedule(tiny_config(schedule__name="sigmoid")), schedule.sigmoid(20))


def test_the_weight_is_that_of_the_networks_output():
    assert parts.weight(tiny_config()) is None
    for prediction in ("eps_bar", "x_0", "velocity"):
        of = {"model__prediction": prediction, "train__weight_gamma": 2.0}
        s = parts.schedule(tiny_config())
        min_snr, p2 = (parts.weight(tiny_config(train__weight=name, **of)) for name in ("min_snr", "p2"))
        assert_same(min_snr, losses.min_snr_weight(s, 2.0, prediction))
        assert_same(p2, losses.p2_weight(s, gamma=2.0, prediction=prediction))


def test_the_loss_of_learned_deviations_cuts_the_output_in_two():
    def prediction_fn(x, t):
        eps_bar, v = jnp.split(Doubled.apply({}, x, t), 2, axis=-1)
        return process.Prediction(eps_bar, sigma=jax.vmap(lambda *of: process.interpolated_sigma(s, *of))(t, v))

    s = parts.schedule(tiny_config(**LEARNED))
    for name, loss in (
        ("hybrid", losses.hybrid_loss),
        ("vlb", lambda fn, s, *of: losses.vlb_loss(fn, s, schedule.sigma_posterior(s), *of)),
    ):
        actual = parts.loss(tiny_config(**LEARNED | {"train__loss": name}))
        actual = jax.jit(functools.partial(actual, lambda x, t: Doubled.apply({}, x, t), s))
        expected = jax.jit(functools.partial(losses.with_noise(loss, 1), prediction_fn, s))
        np.testing.assert_allclose(actual(X_0, T, KEYS), expected(X_0, T, KEYS), rtol=1e-5)


def test_the_network_says_what_the_chain_needs(monkeypatch):
    """ε̄ alone, or with its deviations, or with x_0 where ᾱ_T is 0."""
    monkeypatch.setattr(parts, "model", lambda config: Doubled)
    eps_bar, v = np.split(np.asarray(Doubled.apply({}, X_0, T)), 2, axis=-1)
    fixed = parts.network(tiny_config(**LEARNED | {"sampling__sigma": "beta"}))({}, X_0, T)
    np.testing.assert_allclose(fixed, eps_bar, rtol=1e-6)
    config = tiny_config(**LEARNED)
    found = parts.network(config)({}, X_0, T)
    expected = [process.interpolated_sigma(parts.schedule(config), t, v[i]) for i, t in enumerate(T)]
    np.testing.assert_allclose(found.sigma, expected, rtol=1e-6)
    assert found.x_0 is None
    config = tiny_config(schedule__zero_terminal=True, model__prediction="velocity", data__channels=2)
    found, s = parts.network(config)({}, X_0, T), parts.schedule(config)
    output = Doubled.apply({}, X_0, T)[1]  # at t = T the velocity is −x_0
    np.testing.assert_allclose(found.x_0[1], -output, rtol=1e-6)
    np.testing.assert_allclose(found.eps_bar[1, ..., :1], X_0[1], rtol=1e-6)
    assert found.sigma is None and s.alpha_bar[-1] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule__zero_terminal": True}, r"model\.prediction='eps_bar' must be x_0 or velocity for"),
        (
            {"schedule__zero_terminal": True, "model__prediction": "x_0", "train__loss": "vlb"},
            r"train\.loss='vlb' must be 'simple' for config\.schedule\.zero_terminal",
        ),
        (
            {"schedule__zero_terminal": True, "model__prediction": "x_0", "train__weight": "min_snr"},
            r"train\.weight='min_snr' must be 'one' for .*zero_terminal",
        ),
        ({"schedule__log_snr_shift": float("nan")}, r"log_snr_shift=nan must be a number in -20\.\.20"),
        ({"train__weight": "snr"}, r"train\.weight='snr' must be one of one, min_snr, p2"),
        ({"train__weight_gamma": 0.0}, r"train\.weight_gamma=0\.0 must be a number > 0"),
        ({"train__weight": "p2", "train__loss": "step"}, r"train\.weight='p2' must be 'one' unless .*'simple'"),
        ({"train__loss": "hybrid"}, r"train\.loss='hybrid' must be another without config\.model\.learned_sigma=True"),
        ({"sampling__sigma": "learned"}, r"sampling\.sigma='learned' must be another without"),
        ({"model__learned_sigma": True}, r"train\.loss='simple' must be hybrid or vlb with config\.model\.learned_sig"),
        (LEARNED | {"model__prediction": "x_0"}, r"model\.prediction='x_0' must be eps_bar with .*learned_sigma"),
        (LEARNED | {"schedule__num_steps": 1}, r"schedule\.num_steps=1 must be at least 2 with .*learned_sigma"),
        ({"sampling__grid": "bound"}, r"sampling\.grid='bound' must be 'default' for .*'ancestral'"),
        ({"sampling__grid": "linear"}, r"sampling\.grid='linear' must be one of default, uniform"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configs.check(tiny_config(**changes))


@pytest.mark.parametrize(
    "changes", [{"sampling__sigma": "analytic"}, {"sampling__sampler": "ddim", "sampling__grid": "bound"}]
)
def test_training_cannot_draw_by_what_is_not_measured_yet(changes):
    configs.check(config := tiny_config(**changes))
    with pytest.raises(
        UserError, match=r"needs what --mode=evaluate measures .* give --(sigma|grid)=\w+ to --mode=sam"
    ):
        parts.build(config)


def test_a_schedule_of_the_user_that_ends_at_0_needs_another_network():
    def to_zero(num_steps):
        return schedule.zero_terminal(schedule.ho_linear(num_steps))

    config = configs.with_functions(tiny_config(), schedule=to_zero)
    with pytest.raises(UserError, match=r"alpha_bar_T is 0, where eps_bar tells nothing of x_0"):
        parts.schedule(config)
    own = configs.with_functions(tiny_config(model__prediction="velocity"), schedule=to_zero)
    assert parts.schedule(own).alpha_bar[-1] == 0


def test_what_was_not_measured_is_asked_for(tmp_path):
    write_random_run(tmp_path)
    for settings in ({"sigma": "analytic"}, {"sampler": "ddim", "grid": "bound"}):
        with pytest.raises(
            UserError, match=r"--(sigma=analytic|grid=bound) needs the errors .* --mode=evaluate --work"
        ):
            diffusion_jax.load(tmp_path, **settings)
    file = tmp_path / "evaluation" / "0" / "bound-train.npz"
    file.parent.mkdir(parents=True)
    np.savez(file, each=np.zeros((3, 4)), sums=np.ones((3, 20)))  # of an earlier version
    with pytest.raises(UserError, match=r"bound-train\.npz cannot be read .* run --mode=evaluate again"):
        diffusion_jax.load(tmp_path, sigma="analytic")
    np.savez(file, each=np.zeros((4, 4)), sums=np.arange(80.0).reshape(4, 20))
    found = measured.read(tmp_path, tiny_config(sampling__sigma="analytic"))
    np.testing.assert_array_equal(found.squared_error, [0, *np.arange(20, 40) / 4])
    np.testing.assert_array_equal(found.mean_square, [0, *np.arange(60, 80) / 4])
    with pytest.raises(UserError, match=r"--workdir=\S+ --step=3 --num=256"):
        diffusion_jax.load(tmp_path, sigma="analytic", step=3)


@pytest.mark.slow
def test_a_run_with_learned_deviations_from_evaluation_to_diffusers_and_back(tmp_path, capsys):
    """Its samples differ by the deviations alone; what is measured serves samples, bound and export."""
    run = tmp_path / "run"
    write_random_run(run, **LEARNED)
    x = {}
    for sigma in ("learned", "beta"):
        sample_fn, params = diffusion_jax.load(run, sigma=sigma)
        x[sigma] = np.asarray(sample_fn(params, jax.random.key(0)))
    assert np.isfinite(x["learned"]).all() and abs(x["learned"] - x["beta"]).max() > 0.01
    bits = {"learned": evaluate(run, num=8)["splits"]["train"]["bits_per_dim"]}
    bits |= {sigma: evaluate(run, num=8, sigma=sigma)["splits"]["train"]["bits_per_dim"] for sigma in ("analytic",)}
    assert len({f"{value:.3f}" for value in bits.values()}) == 2 and np.isfinite(list(bits.values())).all()

    settings = {"sampler": "ddim", "steps": 5, "sigma": "analytic", "grid": "bound"}
    sample_fn, params = diffusion_jax.load(run, **settings)
    expected = np.asarray(sample_fn(params, jax.random.key(0)))
    export_sampler(run, str(tmp_path / "sampler.npz"), **settings)
    export_again(tmp_path / "sampler.npz", str(tmp_path / "again.npz"))
    for name in ("sampler.npz", "again.npz"):
        exported, own = diffusion_jax.load_exported(tmp_path / name)
        np.testing.assert_allclose(exported(own, jax.random.key(0), num=4), expected, atol=1e-5)

    export_diffusers(run, str(tmp_path / "diffusers"))
    import_diffusers(str(tmp_path / "diffusers"), tmp_path / "back", tiny_config())
    config = workdirs.read_config(tmp_path / "back")
    assert config.model.learned_sigma and config.sampling.sigma == "learned" and config.train.loss == "hybrid"
    assert_same(ema_params(parts.build(config), tmp_path / "back")[1], params)
    sample_fn, params = diffusion_jax.load(tmp_path / "back", num=4)
    np.testing.assert_allclose(sample_fn(params, jax.random.key(0)), x["learned"], atol=1e-5)
