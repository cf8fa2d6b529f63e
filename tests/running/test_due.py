from diffusion_jax.running import due


def test_dispatches_end_where_something_is_due():
    """And at the same steps, wherever they begin."""

    def dispatches(start):
        return list(due.dispatches(start, 13, [4, 6, 5, 0]))

    assert dispatches(0) == [(4, 4), (1, 5), (1, 6), (2, 8), (2, 10), (2, 12), (1, 13)]
    assert dispatches(6) == [(2, 8), (2, 10), (2, 12), (1, 13)]
    assert dispatches(11) == [(1, 12), (1, 13)]
    assert dispatches(13) == []


def test_multiples_are_due():
    assert [number for number in range(13) if due.is_due(number, [0, 5, 4])] == [4, 5, 8, 10, 12]
    assert not any(due.is_due(number, [0, 0]) for number in range(13))
