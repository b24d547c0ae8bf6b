"""`lamda watch`: a run as it goes on, until it ends."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lamda.config.errors import UserError, nearest
from lamda.console import STYLES, duration, figure, of_total
from lamda.runs.curve import draw
from lamda.runs.reading import Metrics, Row, Standing, changed_at, find_runs, last_lines, read_standing
from lamda.storage.commit import complete
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import STOP_EXIT

SECONDS = 1.0
"""Between two looks."""
RECENT_STEPS = 100
"""Steps whose mean duration tells when the run will end."""
LOG_LINES = 6
EXITS = {"finished": 0, "preempted": STOP_EXIT, "failed": 1, "died": 1}
COLUMNS = (
    "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "step_seconds", "skipped_steps", "rollbacks",
    "eval/loss",
)  # fmt: skip
MARGIN = 10
"""Columns left of the curve, for its scale."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda watch`."""
    parser = argparse.ArgumentParser(
        prog="lamda watch",
        allow_abbrev=False,
        epilog="exit code: the run's: 0 finished, 75 preempted, 1 failed or died",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, which may not exist yet")
    return parser


def main(argv: list[str]) -> int:
    """`RUN`; returns the exit code of the run: 0 finished, 75 preempted, 1 failed or died. Raises UserError."""
    directory = RunDirectory(parser().parse_args(argv).run)
    runs = find_runs(directory.path, depth=1)
    if not runs:
        print(f"{directory.path}: no run is here yet{_likely(directory.path)}; waiting for it (Ctrl-C ends this)")
    elif runs != [directory.path]:
        names = ", ".join(path.name for path in runs)
        raise UserError(f"{directory.path}: is no run but a folder of runs; watch one of {names}")
    console = Console()
    if not console.is_terminal:
        return watch(directory, Lines())
    with Live(console=console, auto_refresh=False) as live:
        return watch(
            directory,
            lambda look: live.update(picture(look, width=console.width, height=console.height), refresh=True),
        )


@dataclass(frozen=True)
class Look:
    """A run as it is now. new: index of the first row that the look before did not have."""

    directory: RunDirectory
    standing: Standing
    rows: list[Row]
    new: int

    @property
    def last(self) -> Row | None:
        """The newest finished step."""
        return self.rows[-1] if self.rows else None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.standing.status in EXITS

    def progress(self) -> str:
        """`200/1000`."""
        return of_total(self.last["step"] if self.last else None, self.standing.steps)

    def remaining(self) -> str:
        """The time to the run's end at the pace of its last steps."""
        seconds = [row["step_seconds"] for row in self.rows[-RECENT_STEPS:] if row.get("step_seconds") is not None]
        if self.ended or not seconds or self.standing.steps is None:
            return duration(None)
        return duration((self.standing.steps - self.rows[-1]["step"]) * sum(seconds) / len(seconds))

    def log(self) -> list[str]:
        """The end of train.log."""
        return last_lines(self.directory.log)[-LOG_LINES:]

    def word(self) -> str:
        """How the run stands."""
        return "not begun" if self.standing.status == "unknown" and not self.rows else self.standing.status


def watch(directory: RunDirectory, show: Callable[[Look], None], *, seconds: float = SECONDS) -> int:
    """Show a run every so many seconds until it has ended; returns its exit code."""
    metrics = Metrics(directory.metrics, keep=COLUMNS)
    while True:
        # In this order: the rows of a run that has ended are all there.
        standing = read_standing(directory)
        new = metrics.update()
        look = Look(directory, standing, metrics.rows, new)
        show(look)
        if look.ended:
            return EXITS[standing.status]
        time.sleep(seconds)


class Lines:
    """Plain lines: a step each, and what happens to the run."""

    def __init__(self) -> None:
        self._known: int | None = None
        self._word = ""

    def __call__(self, look: Look) -> None:
        """Print what is new; of the steps before the first look only the last."""
        if self._known is None:
            new = max(0, len(look.rows) - 1)
        else:
            new = look.new
            if new < self._known:
                self._say(f"went back to step {look.rows[new - 1]['step'] if new else 0}")
        for row in look.rows[new:]:
            step = of_total(row["step"], look.standing.steps)
            self._say(f"step {step}  {_figures(row)}  ETA {look.remaining()}")
        self._known = len(look.rows)
        if look.word() != self._word:
            self._word = look.word()
            if EXITS.get(look.standing.status) == 1:
                self._say("\n".join(look.log()))
            self._say(self._word + (f": {look.standing.reason}" if look.standing.reason else ""))

    def _say(self, text: str) -> None:
        print(text, flush=True)


def picture(look: Look, *, width: int, height: int) -> Group:
    """The run in a terminal of so many columns and lines: figures, the curve of the loss, the end of the log."""
    head = Text.assemble(
        (look.word(), STYLES.get(look.standing.status, "")),
        f"  step {look.progress()}  ETA {look.remaining()}  {look.directory.path}",
        no_wrap=True,
        overflow="ellipsis",
    )
    log = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in look.log()]
    parts = [head, *([Text(look.standing.reason)] if look.standing.reason else [])]
    if look.rows:
        table = _table(look)
        curve = max(3, min(16, height - table.row_count - len(log) - 4))
        parts += [table, *_curve(look.rows, width=max(MARGIN + 10, width), height=curve)]
    return Group(*parts, *log)


def _figures(row: Row) -> str:
    mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
    held_out = f"  eval/loss {figure(row, 'eval/loss', '.4f')}" if "eval/loss" in row else ""
    return (
        f"loss {figure(row, 'loss', '.4f')}  lr {figure(row, 'lr', '.2e')}  "
        f"{figure(row, 'tokens_per_second', ',.0f')} tokens/s{mfu}{held_out}"
    )


def _table(look: Look) -> Table:
    row, rows = look.last, look.rows
    checkpoints = complete(look.directory.checkpoints)
    held_out = next((each for each in reversed(rows) if "eval/loss" in each), None)
    age = duration(time.time() - (changed_at(look.directory.metrics) or 0.0))
    cells = [
        ("loss", figure(row, "loss", ".4f")),
        ("held-out loss", figure(held_out, "eval/loss", ".4f") + (f" (step {held_out['step']})" if held_out else "")),
        ("learning rate", figure(row, "lr", ".2e")),
        ("gradient norm", figure(row, "grad_norm", ".3f")),
        ("tokens/s", figure(row, "tokens_per_second", ",.0f")),
        ("MFU", f"{row['mfu']:.1%}" if row.get("mfu") else "-"),
        ("tokens", figure(row, "tokens", ",")),
        ("last step", f"{age} ago"),
        ("refused steps", figure(row, "skipped_steps", "d")),
        ("rollbacks", figure(row, "rollbacks", "d")),
        ("checkpoint", checkpoints[-1].name if checkpoints else "-"),
    ]
    table = Table.grid(padding=(0, 2))
    for first, second in zip(cells[::2], [*cells[1::2], ("", "")], strict=False):
        table.add_row(first[0], Text(first[1], style="bold"), second[0], Text(second[1], style="bold"))
    return table


def _curve(rows: list[Row], *, width: int, height: int) -> list[Text]:
    """The losses of all steps, with the scale at its left and the first and last step below it."""
    losses = np.array([np.nan if row.get("loss") is None else row["loss"] for row in rows], dtype=np.float64)
    lines, low, high = draw(losses, width=width - MARGIN, height=height)
    first, last = str(rows[0]["step"]), str(rows[-1]["step"])
    lines.append(first + last.rjust(width - MARGIN - len(first)))
    scale = [f"{high:.3f}", "loss", *[""] * (height - 3), f"{low:.3f}", "step"]
    return [Text(f"{mark:>{MARGIN - 2}} {line}", no_wrap=True) for mark, line in zip(scale, lines, strict=True)]


def _likely(path: Path) -> str:
    """The run beside it whose name is most like this one's."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, (run.name for run in find_runs(path.parent, depth=1)))
