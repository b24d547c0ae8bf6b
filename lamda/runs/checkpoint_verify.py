"""`lamda checkpoint verify`: whether checkpoints are what was written, by their manifests. Nothing is changed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import Progress, show_table, size_of
from lamda.runs.checkpoints import NAME, NAME_HELP, PRUNED, find_checkpoints, glance, read_manifest
from lamda.storage import commit


@dataclass(frozen=True)
class Verdict:
    """What became of a checkpoint's check; problem is None where every file is as written."""

    checkpoint: str
    bytes: int
    seconds: float
    problem: str | None

    @property
    def damaged(self) -> bool:
        """Whether it is there, and not as it was written."""
        return self.problem not in (None, PRUNED)


def parser() -> argparse.ArgumentParser:
    """The options of `lamda checkpoint verify`."""
    parser = argparse.ArgumentParser(
        prog="lamda checkpoint verify", allow_abbrev=False, epilog="exit code: 0 if all are intact, 1 if one is damaged"
    )
    parser.add_argument("name", metavar=NAME, help=f"{NAME_HELP}; all of a run are verified")
    parser.add_argument("--json", action="store_true", help="a JSON array, one object per checkpoint")
    return parser


def main(argv: list[str]) -> int:
    """`CHECKPOINT_OR_RUN [--json]`; returns 1 where one is damaged. Raises UserError."""
    options = parser().parse_args(argv)
    paths = find_checkpoints(options.name)
    with Progress("verifying", total=sum(glance(path).bytes for path in paths), unit="bytes") as shown:
        verdicts = [verify(path, checked=shown.advance) for path in paths]
    if options.json:
        print(json.dumps([vars(verdict) for verdict in verdicts], indent=1))
    else:
        show_table(("checkpoint", "size", "checked at", "result"), [_cells(each) for each in verdicts], left=(0, 3))
    return int(any(verdict.damaged for verdict in verdicts))


def verify(path: Path, *, checked: Callable[[int], object]) -> Verdict:
    """Hash a checkpoint's files; `checked` is told the size of each, once it is done."""
    began = time.monotonic()
    try:
        sizes = [entry["size"] for _, entry in sorted(read_manifest(path)["files"].items())]
    except UserError:
        sizes = []
    done, problem = 0, None if sizes else commit.problem_of(path)
    for part, size in enumerate(sizes):
        problem = commit.problem_of(path, part=part, parts=len(sizes))
        if problem is not None:
            break
        done += size
        checked(size)
    if problem is not None and not path.exists():
        problem = PRUNED
    return Verdict(str(path), done, round(time.monotonic() - began, 3), problem)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    rate = f"{size_of(verdict.bytes / max(verdict.seconds, 1e-3))}/s"
    result = f"damaged, {verdict.problem}" if verdict.damaged else verdict.problem or "as written"
    return Path(verdict.checkpoint).name, size_of(verdict.bytes), rate, result
