"""Train steps on all devices: several in one program, and with the data set in their memory."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.data import order, pipeline
from diffusion_jax.step import AXIS


def several(step: Callable) -> Callable:
    """Returns k steps in one program: (state, (batches, indices [B])) -> (state, metrics [k]).

    The arrays of `batches` are [k, B, …].
    """

    def steps(state, batches_and_indices):
        batches, indices = batches_and_indices
        k = len(batches["image"])
        return _repeat(step, k, state, lambda _, i: (jax.tree.map(lambda x: x[i], batches), indices))

    return steps


def resident(step: Callable, k: int, seed: int, batch_size: int) -> Callable:
    """Returns `several` for a data set on the device: (state, (dataset, indices [B])) -> (state, metrics [k]).

    The arrays of `dataset` hold all examples. Each step takes the same batch as from `pipeline.batches`.
    """

    def steps(state, dataset_and_indices):
        dataset, indices = dataset_and_indices

        def batch(state, _):
            positions = state.step.astype(jnp.uint32) * jnp.uint32(batch_size) + indices.astype(jnp.uint32)
            examples = order.shuffled(positions, len(dataset["image"]), seed)
            return jax.tree.map(lambda x: x[examples], dataset), indices

        return _repeat(step, k, state, batch)

    return steps


def _repeat(step, k, state, batch_of):
    """Takes k steps in a `lax.scan`; step i has the batch `batch_of(state, i)`.

    A single step runs outside a loop: inside loops XLA's gradients of convolutions on the CPU take 12 to
    50 times as long and are rounded differently (2e-7).
    """
    if k > 1:
        return lax.scan(lambda state, i: step(state, batch_of(state, i)), state, jnp.arange(k))
    state, metrics = step(state, batch_of(state, 0))
    return state, jax.tree.map(lambda x: x[None], metrics)


def pmapped(steps: Callable, batch_axis: int | None = 0) -> Callable:
    """Maps steps over all devices: batches, indices and metrics get a leading axis of the D devices.

    The state is donated.

    Args:
      batch_axis: None gives all devices the same arrays; batches then have no device axis.
    """
    in_axes, out_axes = (None, (batch_axis, 0)), (None, 0)
    return jax.pmap(steps, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=0)


def replicate(tree: Any) -> Any:
    """Copies arrays to every device in the layout of the pmapped step's result; another would compile it twice."""
    return jax.device_put(tree, _on_all_devices())


def replicated(tree: Any) -> Any:
    """Returns the shapes of `replicate`'s result, for arrays or shapes: enough to compile the pmapped step."""
    sharding = _on_all_devices()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _on_all_devices():
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())


def program_and_feed(
    train_step: Callable,
    images: Any,
    start: int,
    ks: Iterable[int],
    shape: tuple[int, int],
    *,
    on_device: bool,
    seed: int,
    batch_size: int,
) -> tuple[Callable[[int], Callable], Any, Iterator[Any]]:
    """Returns (k -> the program of k steps on all devices, the batch of the first dispatch, the batches of all).

    Args:
      images: the data set.
      start: steps done.
      ks: steps of each dispatch.
      shape: (devices of this process, images of each).
      on_device: True keeps the data set in each device's memory.
    """
    if on_device:
        several_of = functools.cache(lambda k: pmapped(resident(train_step, k, seed, batch_size), batch_axis=None))
        everything = replicate(images.examples(np.arange(len(images))))
        return several_of, everything, itertools.repeat(everything)
    program = pmapped(several(train_step))  # takes as many steps as it gets batches
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    dataset = pipeline.batches(images, seed=seed, batch_size=batch_size, **processes)
    feed = pipeline.to_devices(pipeline.iterate(dataset, start, images.num_threads), ks, shape)
    first = next(feed)
    return lambda k: program, first, itertools.chain([first], feed)
