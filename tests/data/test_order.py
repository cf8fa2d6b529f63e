import collections

import jax
import numpy as np
import pytest

from diffusion_jax.data import order

SIZES = [1, 2, 3, 4, 5, 16, 17, 1000, 4097]


@pytest.mark.parametrize("num", SIZES)
def test_each_epoch_is_a_permutation(num):
    indices = order.shuffled(np.arange(3 * num), num, seed=7)
    for epoch in np.split(indices, 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num))


@pytest.mark.parametrize("num", SIZES)
def test_jax_and_numpy_agree(num):
    positions = np.concatenate([np.arange(2 * num), 2**32 - 1 - np.arange(50)])
    indices = jax.jit(lambda x: order.shuffled(x, num, seed=3))(positions.astype(np.uint32))
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, order.shuffled(positions, num, seed=3))


def test_an_index_depends_on_its_position_alone():
    stream = order.shuffled(np.arange(5000), 1797, seed=0)
    np.testing.assert_array_equal(order.shuffled(np.array([4000, 17, 2000]), 1797, seed=0), stream[[4000, 17, 2000]])


@pytest.mark.parametrize("varied", ["seed", "epoch"])
def test_all_orders_are_equally_frequent(varied):
    """Over 12,000 seeds or epochs, each of the 24 orders of four examples occurs about 500 times."""
    if varied == "seed":
        orders = [tuple(order.shuffled(np.arange(4), 4, seed).tolist()) for seed in range(12_000)]
    else:
        orders = map(tuple, order.shuffled(np.arange(48_000), 4, seed=0).reshape(-1, 4).tolist())
    counts = collections.Counter(orders)
    assert len(counts) == 24
    assert min(counts.values()) > 400 and max(counts.values()) < 600


def test_neighbours_are_uncorrelated():
    """Neighbouring positions, epochs and seeds correlate by less than 5 / sqrt(n), the level of chance."""
    n = 20_011
    first, second = np.split(order.shuffled(np.arange(2 * n), n, seed=5), 2)
    others = order.shuffled(np.arange(n), n, seed=6)
    for a, b in [(first[1:], first[:-1]), (first, np.arange(n)), (first, second), (first, others)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5


def test_neighbouring_seeds_share_no_epochs():
    """Two runs that shared epochs would train in the same order, one epoch apart."""
    epochs = {
        tuple(row) for seed in range(20) for row in order.shuffled(np.arange(640), 32, seed).reshape(20, 32).tolist()
    }
    assert len(epochs) == 400
