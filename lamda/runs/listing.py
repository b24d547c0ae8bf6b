"""`lamda list`: the runs in a folder, branches below their parent, and their status."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
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

_Entry = tuple[float, "RunSummary", Metrics | None]

REASON_WIDTH = 80
"""Characters of a reason in the table; --json has the whole text."""


@dataclass(frozen=True)
class RunSummary:
    """One row of the list. age_seconds: since the last step. checkpoint: the newest one. parent: that of a branch."""

    run: str
    status: str
    reason: str | None
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    age_seconds: float | None
    checkpoint: str | None
    parent: str | None


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
        cells = [_cells(summary, row, depth=depth) for depth, summary, row in _as_tree(runs)]
        show_table(header, cells, left=(0, 1, 6, 7))
    return 0


def _summarize(path: Path) -> _Entry:
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
        parent=None if (parent := directory.parent()) is None else str(parent),
    )
    return max(last_step_at or 0.0, modified_at(path / "status.json") or 0.0), summary, row


def _as_tree(runs: list[_Entry]) -> Iterator[tuple[int, RunSummary, Metrics | None]]:
    """Depth, summary and last row of each run, branches below their parent."""
    entries = {Path(entry[1].run).resolve(): entry for entry in runs}
    below: dict[Path | None, list[Path]] = {}
    for path, (_, summary, _) in entries.items():
        parent = None if summary.parent is None else Path(summary.parent)
        below.setdefault(parent if parent in entries and parent != path else None, []).append(path)
    # Folders that were renamed may name each other as parents; from the top they are never reached.
    left = [(0, path) for path in (*below.get(None, []), *entries)]
    while left:
        depth, path = left.pop(0)
        if (entry := entries.pop(path, None)) is not None:
            yield depth, *entry[1:]
            left[:0] = [(depth + 1, each) for each in below.get(path, [])]


def _cells(summary: RunSummary, row: Metrics | None, *, depth: int) -> tuple[str, ...]:
    return (
        "  " * (depth - 1) + "└ " * (depth > 0) + summary.run,
        summary.status,
        of_total(summary.step, summary.steps) + (f" {stage}" if (stage := (row or {}).get("stage")) else ""),
        figure(row, "loss", ".4f"),
        figure(row, "tokens_per_second", ",.0f"),
        NONE if summary.age_seconds is None else f"{duration(summary.age_seconds)} ago",
        summary.checkpoint or NONE,
        shorten(summary.reason or "", REASON_WIDTH, placeholder="..."),
    )
