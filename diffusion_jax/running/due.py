"""The steps after which something is due: a checkpoint, a grid, an evaluation."""

from collections.abc import Iterator, Sequence


def is_due(number: int, every: Sequence[int]) -> bool:
    """Returns True after step `number` if it is a multiple of one of `every`; 0 means never."""
    return number > 0 and any(n and number % n == 0 for n in every)


def dispatches(start: int, num_steps: int, every: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (k, end) for each dispatch: k steps in one program, the last of which is `end`.

    A dispatch ends at every multiple of the numbers in `every`, where 0 means never, and so not at places that depend
    on `start`.
    """
    while start < num_steps:
        end = min(num_steps, *(start - start % n + n for n in every if n))
        yield end - start, end
        start = end
