"""Tables and figures for people: aligned lines in a pipe, lines and colours at a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lamda.console import one_line

STYLES = {
    "running": "green", "starting": "green", "finished": "blue", "preempted": "yellow",
    "failed": "red", "died": "red", "damaged": "red",
}  # fmt: skip
NONE = "-"
LONG = 1e15
"""From here on a figure is written with an exponent."""


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> None:
    """Print a table; the columns in `left` are text, the others figures that end at the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell.split(",")[0], "")) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in sized]
        print("  ".join(cells).rstrip())


def duration(seconds: float | None) -> str:
    """`41s`, `12m05s`, `3h20m`, `5d07h`: two units at most."""
    if seconds is None:
        return NONE
    whole = max(0, round(seconds))
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02}{part}"
    return f"{whole}s"


def size_of(count: float) -> str:
    """Bytes with a unit of thousands, `28.4 GB`."""
    return filesize.decimal(round(count))


def of_total(step: int | None, steps: int | None) -> str:
    """`200/1000`, as much of it as is known."""
    return NONE if step is None else str(step) if steps is None else f"{step}/{steps}"


def figure(row: dict[str, object] | None, name: str, form: str) -> str:
    """A column of a row of metrics in a format; `nan` where the value was not finite, `-` where there is none."""
    if row is None or name not in row:
        return NONE
    value = row[name]
    if isinstance(value, int | float) and abs(value) >= LONG:
        form = ".3g"
    return "nan" if value is None else format(value, form)
