"""`lamda list`: the runs in a folder and how each of them stands."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from lamda.config.errors import UserError
from lamda.console import NONE, duration, figure, of_total, show_table
from lamda.runs.reading import DEPTH, Row, changed_at, find_runs, last_row, read_standing
from lamda.storage.commit import complete
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import RunDirectory

REASON = 80
"""Characters of a reason in the table; --json has all."""


@dataclass(frozen=True)
class Summary:
    """A run in a line. age_seconds: since its last step. checkpoint: name of the newest one."""

    run: str
    status: str
    reason: str | None
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    age_seconds: float | None
    checkpoint: str | None


def parser() -> argparse.ArgumentParser:
    """The options of `lamda list`."""
    parser = argparse.ArgumentParser(prog="lamda list", allow_abbrev=False)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        nargs="?",
        default=Path("runs"),
        help=f"search for runs here and up to {DEPTH} folders deep; default: runs",
    )
    parser.add_argument("--json", action="store_true", help="a JSON array, one object per run")
    return parser


def main(argv: list[str]) -> int:
    """`[DIR] [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: there is no such folder; name one that holds runs, such as runs")
    runs = sorted((_look(path) for path in find_runs(options.folder)), key=lambda each: each[0], reverse=True)
    if options.json:
        print(json.dumps([asdict(summary) for _, summary, _ in runs], indent=1))
    elif not runs:
        print(f"{options.folder}: no run is here, nor {DEPTH} folders deep")
    else:
        header = ("run", "status", "step", "loss", "tokens/s", "last step", "checkpoint", "reason")
        show_table(header, [_cells(summary, row) for _, summary, row in runs], left=(0, 1, 6, 7))
    return 0


def _look(path: Path) -> tuple[float, Summary, Row | None]:
    """When the run last gave a sign, its summary, and its last row of metrics."""
    directory = RunDirectory(path)
    standing, row = read_standing(directory), last_row(directory.metrics)
    stepped = changed_at(directory.metrics) if row else None
    try:
        checkpoints = complete(directory.checkpoints)
    except UnreadableError:  # not ours to read: the other runs are shown all the same
        checkpoints = []
    values: dict[str, Any] = row or {}
    summary = Summary(
        run=str(path),
        status=standing.status,
        reason=standing.reason,
        step=values.get("step"),
        steps=standing.steps,
        loss=values.get("loss"),
        tokens_per_second=values.get("tokens_per_second"),
        age_seconds=None if stepped is None else round(time.time() - stepped, 1),
        checkpoint=checkpoints[-1].name if checkpoints else None,
    )
    return max(stepped or 0.0, changed_at(path / "status.json") or 0.0), summary, row


def _cells(summary: Summary, row: Row | None) -> tuple[str, ...]:
    return (
        summary.run,
        summary.status,
        of_total(summary.step, summary.steps),
        figure(row, "loss", ".4f"),
        figure(row, "tokens_per_second", ",.0f"),
        NONE if summary.age_seconds is None else f"{duration(summary.age_seconds)} ago",
        summary.checkpoint or NONE,
        shorten(summary.reason or "", REASON, placeholder="..."),
    )
