import collections

import jax
import numpy as np
import pytest

from diffusion_jax.data import order

SIZES = [1, 2, 3, 4, 5, 16, 17, 1000, 4097]


@pytest.mark.parametrize("num", SIZES)
def test_each_epoch_is_a_permutation(num):
    found = order.shuffled(np.arange(3 * num), num, seed=7)
    for epoch in np.split(found, 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num))


@pytest.mark.parametrize("num", SIZES)
def test_a_program_finds_the_same(num):
    positions = np.concatenate([np.arange(2 * num), 2**32 - 1 - np.arange(50)])
    found = jax.jit(lambda x: order.shuffled(x, num, seed=3))(positions.astype(np.uint32))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, order.shuffled(positions, num, seed=3))


def test_positions_do_not_depend_on_each_other():
    whole = order.shuffled(np.arange(5000), 1797, seed=0)
    np.testing.assert_array_equal(order.shuffled(np.array([4000, 17, 2000]), 1797, seed=0), whole[[4000, 17, 2000]])


@pytest.mark.parametrize("what", ["seed", "epoch"])
def test_all_orders_come_up(what):
    """The 24 orders of four, of 12,000 seeds or epochs: about 500 times each."""
    if what == "seed":
        found = [tuple(order.shuffled(np.arange(4), 4, seed).tolist()) for seed in range(12_000)]
    else:
        found = map(tuple, order.shuffled(np.arange(48_000), 4, seed=0).reshape(-1, 4).tolist())
    counts = collections.Counter(found)
    assert len(counts) == 24
    assert min(counts.values()) > 400 and max(counts.values()) < 600


def test_neighbours_part():
    """Of an epoch, of neighbouring seeds and of neighbouring epochs: no correlation beyond chance (5 / sqrt(n))."""
    n = 20_011
    first, second = np.split(order.shuffled(np.arange(2 * n), n, seed=5), 2)
    others = order.shuffled(np.arange(n), n, seed=6)
    for a, b in [(first[1:], first[:-1]), (first, np.arange(n)), (first, second), (first, others)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5


def test_neighbouring_seeds_share_no_epochs():
    """Else two runs would see the same order, one epoch apart."""
    epochs = {
        tuple(row) for seed in range(20) for row in order.shuffled(np.arange(640), 32, seed).reshape(20, 32).tolist()
    }
    assert len(epochs) == 400
