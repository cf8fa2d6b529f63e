"""Batches of images: the batch of step k is a pure function of (seed, k)."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import grain  # noqa: TID251 (the only importer of Grain)
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.data import order
from diffusion_jax.data.cache import Cached, OnTheFly


def batches(
    images: Cached | OnTheFly, *, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Returns a data set whose entry k is this process's share of the batch of step k.

    A batch is {"image": uint8 [B, H, W, C]}, and "label" int32 [B] where the source has classes, with
    B = batch_size / process_count. It is a pure function of (seed, k). The global batch has the images at
    positions k · batch_size, … of `order.shuffled`, for every process_count; example j of process p is its
    number j · process_count + p. Batches continue across the end of an epoch.
    """
    share = np.arange(process_index, batch_size, process_count)

    # One element is a whole batch: passing single images through Grain is far slower.
    def fetch(step):
        return images.examples(order.shuffled(step * batch_size + share, len(images), seed))

    return grain.MapDataset.range(2**32 // batch_size).map(fetch)


def iterate(dataset: grain.MapDataset, start: int, num_threads: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over dataset[start], dataset[start + 1], …; threads read at least 8 batches ahead."""
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(8, num_threads))
    return iter(dataset[start:].to_iter_dataset(ahead))


def indices(batch_size: int) -> np.ndarray:
    """Returns the numbers of this process's examples in the global batch, int [D, B] for its D devices.

    A device of N has every N-th example.
    """
    return np.arange(jax.process_index(), batch_size, jax.process_count()).reshape(-1, jax.local_device_count()).T


def to_devices(
    batches: Iterator[dict[str, np.ndarray]], ks: Iterable[int], shape: tuple[int, int]
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of each dispatch, arrays [D, k, B, …] on the D local devices; prefetches two dispatches.

    The examples go to the devices as in `indices`.
    """
    ahead: collections.deque[dict[str, jax.Array]] = collections.deque()

    def stacked(*steps):
        array, (num_devices, size) = np.stack(steps), shape
        return np.moveaxis(array.reshape(len(steps), size, num_devices, *array.shape[2:]), 2, 0)

    for k in ks:
        ahead.append(split(jax.tree.map(stacked, *itertools.islice(batches, k))))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead


def split(tree: Any) -> Any:
    """Copies arrays [D, …] to the D local devices, one part each."""
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))  # the axis of `running.dispatch.pmapped`
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("batch")))
