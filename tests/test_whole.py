"""Trainings with the UNet itself; tests/test_train.py has a network that compiles quickly."""

import jax
import numpy as np
import pytest
from conftest import assert_same, lines, run, without_speed


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
def test_recomputed_activations_change_rounding_alone(whole, tmp_path):
    workdir, expected = whole
    state = run(tmp_path, train__remat=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, expected.params)
    for line, other in zip(lines(tmp_path), lines(workdir), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
