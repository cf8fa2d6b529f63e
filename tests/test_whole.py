"""Trainings with the UNet itself; tests/test_train.py has a network that compiles quickly."""

import jax
import numpy as np
import pytest
from conftest import assert_same, lines, run, tiny_config, without_speed

from diffusion_jax import losses, parts, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, final state) of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


def test_resumed_run_ends_bit_for_bit_where_the_uninterrupted_ends(whole, tmp_path):
    workdir, state = whole
    run(tmp_path, train__num_steps=3)
    # As after a kill: lines of steps that no checkpoint holds, the last one cut short.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123.0}\n{"step": 5, "lo')
    resumed = run(tmp_path)
    assert int(resumed.step) == 6
    assert_same(resumed, state)
    assert (tmp_path / "samples/6.png").read_bytes() == (workdir / "samples/6.png").read_bytes()
    assert without_speed(lines(tmp_path)) == without_speed(lines(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simple", "step", "vlb by importance"])
def test_losses_teach_to_predict_the_noise(tmp_path, loss):
    """Measured by (15), which is 1 for the initial network, whatever it is trained by."""
    config = tiny_config(
        train__loss=loss.removesuffix(" by importance"),
        train__t_sampling="importance" if "importance" in loss else "uniform",
        train__num_steps=80,
        train__checkpoint_every=80,
        train__batch_size=64,
        train__log_every=20,
        train__learning_rate=5e-3,
    )
    params = train.train(config, str(tmp_path)).params
    x_0 = parts.images(config)[:256].astype(np.float32) / 127.5 - 1
    t = np.arange(256) % 20 + 1
    eps_bar = np.random.default_rng(0).standard_normal(x_0.shape).astype(np.float32)

    @jax.jit
    def error(params):
        def eps_bar_fn(x, t):
            return parts.model(config).apply({"params": params}, x, t)

        return losses.simple_loss(eps_bar_fn, parts.schedule(config), x_0, t, eps_bar).mean()

    assert error(parts.build(config).init_state().params) == pytest.approx(1, abs=0.02)
    assert error(params) < (0.7 if "vlb" in loss else 0.6)  # the bound cares for small t


@pytest.mark.slow
def test_recomputed_activations_change_rounding_alone(whole, tmp_path):
    workdir, expected = whole
    state = run(tmp_path, train__remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, expected.params)
    for line, other in zip(lines(tmp_path), lines(workdir), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
