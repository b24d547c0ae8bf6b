"""`lamda list`: the runs in a folder and their status."""

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
from lamda.storage.manifest import complete
from lamda.storage.metrics import Metrics, last_row
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import DEPTH, RunDirectory, find_runs, modified_at, read_run_status

REASON_WIDTH = 80
"""Characters of a reason in the table; --json has the whole text."""


@dataclass(frozen=True)
class RunSummary:
    """One row of the list. age_seconds: since the last step. checkpoint: name of the newest one."""

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
    about = f"search for runs here and up to {DEPTH} folders deep; default: runs"
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?", default=Path("runs"), help=about)
    parser.add_argument("--json", action="store_true", help="a JSON array, one object per run")
    return parser


def main(argv: list[str]) -> int:
    """`[DIR] [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder; give one that holds runs, such as runs")
    runs = sorted((_summarize(path) for path in find_runs(options.folder)), key=lambda each: each[0], reverse=True)
    if options.json:
        print(json.dumps([asdict(summary) for _, summary, _ in runs], indent=1))
    elif not runs:
        print(f"{options.folder}: no run here, or up to {DEPTH} levels below")
    else:
        header = ("run", "status", "step", "loss", "tokens/s", "last step", "checkpoint", "reason")
        show_table(header, [_cells(summary, row) for _, summary, row in runs], left=(0, 1, 6, 7))
    return 0


def _summarize(path: Path) -> tuple[float, RunSummary, Metrics | None]:
    """When the run was last active, its summary, and its last row of metrics."""
    directory = RunDirectory(path)
    status, row = read_run_status(directory), last_row(directory.metrics)
    last_step_at = modified_at(directory.metrics) if row else None
    try:
        checkpoints = complete(directory.checkpoints)
    except UnreadableError:  # no read permission: still show the other runs
        checkpoints = []
    values: dict[str, Any] = row or {}
    summary = RunSummary(
        run=str(path),
        status=status.state,
        reason=status.reason,
        step=values.get("step"),
        steps=status.steps,
        loss=values.get("loss"),
        tokens_per_second=values.get("tokens_per_second"),
        age_seconds=None if last_step_at is None else round(time.time() - last_step_at, 1),
        checkpoint=checkpoints[-1].name if checkpoints else None,
    )
    return max(last_step_at or 0.0, modified_at(path / "status.json") or 0.0), summary, row


def _cells(summary: RunSummary, row: Metrics | None) -> tuple[str, ...]:
    return (
        summary.run,
        summary.status,
        of_total(summary.step, summary.steps),
        figure(row, "loss", ".4f"),
        figure(row, "tokens_per_second", ",.0f"),
        NONE if summary.age_seconds is None else f"{duration(summary.age_seconds)} ago",
        summary.checkpoint or NONE,
        shorten(summary.reason or "", REASON_WIDTH, placeholder="..."),
    )
