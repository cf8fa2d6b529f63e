"""The norm and the clipping of gradients beside optax's own."""

import jax
import numpy as np
import optax
import pytest

from diffusion_jax.running import gradients

RNG = np.random.default_rng(0)
TREE = {f"{shape}": RNG.standard_normal(shape).astype(np.float32) for shape in [(), (3,), (5, 2), (2, 3, 4, 5)]}


def test_norm():
    assert gradients.norm(TREE) == pytest.approx(float(optax.tree.norm(TREE)), rel=1e-6)
    assert gradients.norm({"a": np.array(3.0), "b": np.array([[0.0, 4.0]])}) == 5
    assert np.isnan(gradients.norm({"a": np.array([np.nan]), "b": np.ones(2)}))


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clip(max_norm):
    ours, theirs = gradients.clip(max_norm), optax.clip_by_global_norm(max_norm)
    assert ours.init(TREE) == theirs.init(TREE)
    clipped, expected = (transform.update(TREE, transform.init(TREE))[0] for transform in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)
    zeros = jax.tree.map(np.zeros_like, TREE)
    jax.tree.map(np.testing.assert_array_equal, ours.update(zeros, ours.init(TREE))[0], zeros)


def test_row_major_changes_no_number():
    jax.tree.map(np.testing.assert_array_equal, jax.jit(gradients.row_major)(TREE), TREE)
