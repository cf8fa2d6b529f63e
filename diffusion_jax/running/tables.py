"""Tables in Markdown."""

from collections.abc import Callable, Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], show: Callable[[object], str] = str
) -> list[str]:
    """Returns the lines of a Markdown table with columns aligned in plain text.

    Args:
      head: names of the columns.
      rows: cells.
      show: turns a cell into text.
    """
    cells = [list(head), *([show(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]
