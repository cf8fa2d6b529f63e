"""The mean of a gradient over the parts of a batch and over the devices; its layout, norm and clipping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def mean(gradient: Callable, parts: int, axis: str) -> Callable:
    """Returns the mean of `gradient` over all devices, each of which computes its examples in `parts`.

    Args:
      gradient: (params, *examples) -> a pytree of means over the examples.
      axis: the name of the mapped axis of the devices.

    Returns:
      (params, indices, *examples) -> what `gradient` returns, the same on all devices. `indices` [B] are those of the
      device's examples in the global batch.
    """

    def mean_of(params, indices, *examples):
        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        if parts == 1:
            return lax.pmean(gradient(params, *examples), axis)
        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), examples)
        total, _ = lax.scan(add, _zeros(gradient, params, cut), cut)
        return lax.pmean(jax.tree.map(lambda x: x / parts, total), axis)

    return mean_of


def mean_in_fixed_order(gradient: Callable, parts: int, axis: str) -> Callable:
    """Returns `mean`, bit for bit for any number of devices; of `parts`, part i has the examples i, i + parts, …

    The global batch is cut into `parts`, a power of two that the number of devices divides.
    """

    def mean_of(params, indices, *examples):
        own = parts // lax.psum(1, axis)
        cut = jax.tree.map(lambda x: x.reshape(-1, own, *x.shape[1:]).swapaxes(0, 1), examples)

        def compute(i, results):
            result = gradient(params, *jax.tree.map(lambda x: x[i], cut))
            return jax.tree.map(lambda all, one: all.at[i].set(one), results, result)

        # XLA rounds differently where it fuses other operations, but not into a loop whose length it does not know.
        once = 1 + jnp.minimum(indices[0], 0)
        results = _sum(lax.fori_loop(0, own * once, compute, _zeros(gradient, params, cut, own)))
        order_of_devices = jnp.argsort(lax.all_gather(indices[0], axis))
        total = jax.tree.map(lambda x: _sum(lax.all_gather(x, axis)[order_of_devices]), results)
        return lax.fori_loop(0, once, lambda _, total: jax.tree.map(lambda x: x / parts, total), total)

    return mean_of


def _zeros(gradient, params, cut, *axes):
    result = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], cut))
    return jax.tree.map(lambda x: jnp.zeros((*axes, *x.shape), x.dtype), result)


def _sum(tree):
    """Adds the entries of the leading axes, whose length is a power of two: the second half to the first, and so on."""
    while (length := len(jax.tree.leaves(tree)[0])) > 1:
        tree = jax.tree.map(lambda x: x[: length // 2] + x[length // 2 :], tree)
    return jax.tree.map(lambda x: x[0], tree)


def row_major(tree: Any) -> Any:
    """Returns the same arrays in the layout of the parameters.

    cuDNN's gradients of kernels have another layout, in which XLA would compute all of the optimizer's arrays.
    """
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), tree)


def norm(tree: Any) -> jax.Array:
    """Returns the norm of all numbers of a pytree.

    Each array is summed along its last axis, and then all sums together. The barrier keeps XLA from adding the arrays
    one by one, which on a GPU takes several kernels for each.
    """
    squares = [(jnp.sum(x**2, axis=-1) if x.ndim > 1 else x**2).ravel() for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(lax.optimization_barrier(jnp.concatenate(squares))))


def clip(max_norm: float) -> optax.GradientTransformation:
    """Returns `optax.clip_by_global_norm`, with the `norm` that the step reports: XLA computes it once."""

    def update(updates, params):
        factor = jnp.minimum(1.0, max_norm / norm(updates))
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(update)
