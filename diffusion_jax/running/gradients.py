"""The mean of a gradient over the parts of a batch and over the devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


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
