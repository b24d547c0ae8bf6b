"""`lamda watch`: follow a run until it ends."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lamda.config.errors import UserError
from lamda.console import STYLES, duration, figure, of_total
from lamda.runs.curves import similar_run
from lamda.storage.manifest import complete
from lamda.storage.metrics import Metrics, MetricsReader, last_lines
from lamda.storage.run_directory import RunDirectory, RunStatus, find_runs, modified_at, read_run_status
from lamda.training.stop_requests import STOP_EXIT

UPDATE_SECONDS = 1.0
"""Between two updates."""
RECENT_STEPS = 100
"""Steps whose mean duration gives the ETA."""
LOG_LINES = 6
EXIT_CODES = {"finished": 0, "preempted": STOP_EXIT, "failed": 1, "died": 1}
COLUMNS = (
    "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "step_seconds", "skipped_steps", "rollbacks",
    "eval/loss",
)  # fmt: skip
MARGIN = 10
"""Columns left of the curve, for its scale."""
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bits of the 4 x 2 dots of a braille character, from the top."""
CLIPPED = 0.05
"""Fraction of the highest values cut off at the top: a run's first losses would flatten all others."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda watch`."""
    epilog = "exit code: the run's: 0 finished, 75 preempted, 1 failed or died"
    parser = argparse.ArgumentParser(prog="lamda watch", allow_abbrev=False, epilog=epilog)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, which may not exist yet")
    return parser


def main(argv: list[str]) -> int:
    """`RUN`; returns the exit code of the run: 0 finished, 75 preempted, 1 failed or died. Raises UserError."""
    directory = RunDirectory(parser().parse_args(argv).run)
    runs = find_runs(directory.path, depth=1)
    if not runs:
        print(f"{directory.path}: no run here yet{similar_run(directory.path)}; waiting for it (Ctrl-C quits)")
    elif runs != [directory.path]:
        names = ", ".join(path.name for path in runs)
        raise UserError(f"{directory.path}: is a folder of runs; watch one of {names}")
    console = Console()
    if not console.is_terminal:
        return watch(directory, LinePrinter())
    with Live(console=console, auto_refresh=False) as live:

        def show(snapshot: Snapshot) -> None:
            live.update(render(snapshot, width=console.width, height=console.height), refresh=True)

        return watch(directory, show)


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. new: index of the first row that the snapshot before did not have."""

    directory: RunDirectory
    status: RunStatus
    rows: list[Metrics]
    new: int

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self.status.state in EXIT_CODES

    def progress(self) -> str:
        """`200/1000`."""
        return of_total(self.rows[-1]["step"] if self.rows else None, self.status.steps)

    def remaining(self) -> str:
        """The estimated time to the end, from the recent steps."""
        seconds = [row["step_seconds"] for row in self.rows[-RECENT_STEPS:] if row.get("step_seconds") is not None]
        if self.ended or not seconds or self.status.steps is None:
            return duration(None)
        return duration((self.status.steps - self.rows[-1]["step"]) * sum(seconds) / len(seconds))

    def log(self) -> list[str]:
        """The end of train.log."""
        return last_lines(self.directory.log)[-LOG_LINES:]

    def state(self) -> str:
        """The state, for people."""
        return "not started" if self.status.state == "unknown" and not self.rows else self.status.state


def watch(directory: RunDirectory, show: Callable[[Snapshot], None], *, seconds: float = UPDATE_SECONDS) -> int:
    """Show a run every `seconds` until it ends; returns its exit code."""
    metrics = MetricsReader(directory.metrics, keep=COLUMNS)
    while True:
        # Status before rows: when the run has ended, all of its rows are read.
        status = read_run_status(directory)
        new = metrics.update()
        snapshot = Snapshot(directory, status, metrics.rows, new)
        show(snapshot)
        if snapshot.ended:
            return EXIT_CODES[status.state]
        time.sleep(seconds)


class LinePrinter:
    """Prints one line per step, and one per change of state."""

    def __init__(self) -> None:
        self._known: int | None = None
        self._state = ""

    def __call__(self, snapshot: Snapshot) -> None:
        """Print new rows; of the rows before the first snapshot only the last."""
        if self._known is None:
            new = max(0, len(snapshot.rows) - 1)
        else:
            new = snapshot.new
            if new < self._known:
                print(f"rolled back to step {snapshot.rows[new - 1]['step'] if new else 0}", flush=True)
        for row in snapshot.rows[new:]:
            step = of_total(row["step"], snapshot.status.steps)
            print(f"step {step}  {_figures(row)}  ETA {snapshot.remaining()}", flush=True)
        self._known = len(snapshot.rows)
        if snapshot.state() != self._state:
            self._state = snapshot.state()
            if EXIT_CODES.get(snapshot.status.state) == 1:
                print("\n".join(snapshot.log()), flush=True)
            print(self._state + (f": {snapshot.status.reason}" if snapshot.status.reason else ""), flush=True)


def render(snapshot: Snapshot, *, width: int, height: int) -> Group:
    """The run for a terminal of `width` columns and `height` lines: figures, loss curve, end of the log."""
    head = Text.assemble(
        (snapshot.state(), STYLES.get(snapshot.status.state, "")),
        f"  step {snapshot.progress()}  ETA {snapshot.remaining()}  {snapshot.directory.path}",
        no_wrap=True,
        overflow="ellipsis",
    )
    log = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in snapshot.log()]
    parts: list[Text | Table] = [head, *([Text(snapshot.status.reason)] if snapshot.status.reason else [])]
    if snapshot.rows:
        table = _table(snapshot)
        curve = max(3, min(16, height - table.row_count - len(log) - 4))
        parts += [table, *_curve(snapshot.rows, width=max(MARGIN + 10, width), height=curve)]
    return Group(*parts, *log)


def _figures(row: Metrics) -> str:
    mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
    held_out = f"  eval/loss {figure(row, 'eval/loss', '.4f')}" if "eval/loss" in row else ""
    return (
        f"loss {figure(row, 'loss', '.4f')}  lr {figure(row, 'lr', '.2e')}  "
        f"{figure(row, 'tokens_per_second', ',.0f')} tokens/s{mfu}{held_out}"
    )


def _table(snapshot: Snapshot) -> Table:
    row, rows = snapshot.rows[-1], snapshot.rows
    checkpoints = complete(snapshot.directory.checkpoints)
    held_out = next((each for each in reversed(rows) if "eval/loss" in each), None)
    age = duration(time.time() - (modified_at(snapshot.directory.metrics) or 0.0))
    cells = [
        ("loss", figure(row, "loss", ".4f")),
        ("held-out loss", figure(held_out, "eval/loss", ".4f") + (f" (step {held_out['step']})" if held_out else "")),
        ("learning rate", figure(row, "lr", ".2e")),
        ("gradient norm", figure(row, "grad_norm", ".3f")),
        ("tokens/s", figure(row, "tokens_per_second", ",.0f")),
        ("MFU", f"{row['mfu']:.1%}" if row.get("mfu") else "-"),
        ("tokens", figure(row, "tokens", ",")),
        ("last step", f"{age} ago"),
        ("skipped steps", figure(row, "skipped_steps", "d")),
        ("rollbacks", figure(row, "rollbacks", "d")),
        ("checkpoint", checkpoints[-1].name if checkpoints else "-"),
    ]
    table = Table.grid(padding=(0, 2))
    for first, second in zip(cells[::2], [*cells[1::2], ("", "")], strict=False):
        table.add_row(first[0], Text(first[1], style="bold"), second[0], Text(second[1], style="bold"))
    return table


def _curve(rows: list[Metrics], *, width: int, height: int) -> list[Text]:
    """The loss curve, with its scale at the left and the first and last step below."""
    losses = np.array([np.nan if row.get("loss") is None else row["loss"] for row in rows], dtype=np.float64)
    lines, low, high = draw_curve(losses, width=width - MARGIN, height=height)
    first, last = str(rows[0]["step"]), str(rows[-1]["step"])
    lines.append(first + last.rjust(width - MARGIN - len(first)))
    scale = [f"{high:.3f}", "loss", *[""] * (height - 3), f"{low:.3f}", "step"]
    return [Text(f"{mark:>{MARGIN - 2}} {line}", no_wrap=True) for mark, line in zip(scale, lines, strict=True)]


def draw_curve(values: NDArray[np.float64], *, width: int, height: int) -> tuple[list[str], float, float]:
    """Lines of braille text with the curve of `values`, and the values at the lower and upper edge.

    A column of dots spans the minimum to the maximum of its values; values above the upper edge are drawn
    at the edge. NaN leaves a gap. Without a finite value all lines are empty.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [" " * width] * height, np.nan, np.nan
    low, high = float(finite.min()), float(np.quantile(finite, 1 - CLIPPED))
    dots = np.zeros((height * 4, width * 2), dtype=bool)
    scale = (height * 4 - 1) / (high - low) if high > low else 0.0
    levels = np.clip((values - low) * scale, 0, height * 4 - 1)
    before: tuple[float, float] | None = None
    for column, part in enumerate(_columns(levels, width * 2)):
        if np.isnan(part).all():
            before = None
            continue
        bottom, top = float(np.nanmin(part)), float(np.nanmax(part))
        # Extend to the previous column, so that a steep curve has no holes.
        first, last = (bottom, top) if before is None else (min(bottom, before[1]), max(top, before[0]))
        dots[round(first) : round(last) + 1, column] = True
        before = bottom, top
    cells = dots[::-1].reshape(height, 4, width, 2)
    codes = 0x2800 + np.einsum("hdwc,dc->hw", cells.astype(int), _DOTS)
    return ["".join(map(chr, line)) for line in codes], low, high


def _columns(levels: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """The values of each column, interpolated where there are fewer values than columns."""
    if len(levels) >= count:
        return np.array_split(levels, count)
    places = np.linspace(0, len(levels) - 1, count)
    left = np.floor(places).astype(int)
    right = np.ceil(places).astype(int)
    return list((levels[left] + (levels[right] - levels[left]) * (places - left))[:, None])
