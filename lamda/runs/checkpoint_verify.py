"""`lamda checkpoint verify`: check checkpoints against the hashes in their manifests. Changes nothing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import Progress, show_table, size_of
from lamda.runs.checkpoints import NAME, NAME_HELP, PRUNED, find_checkpoints, inspect_checkpoint, read_manifest
from lamda.storage import manifest


@dataclass(frozen=True)
class Verification:
    """The result of checking one checkpoint; problem is None if every file is intact."""

    checkpoint: str
    bytes: int
    seconds: float
    problem: str | None

    @property
    def damaged(self) -> bool:
        """Whether the checkpoint exists and is not intact."""
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
    with Progress("verifying", total=sum(inspect_checkpoint(path).bytes for path in paths), unit="bytes") as shown:
        results = [verify(path, checked=shown.advance) for path in paths]
    if options.json:
        print(json.dumps([vars(result) for result in results], indent=1))
    else:
        show_table(("checkpoint", "size", "speed", "result"), [_cells(each) for each in results], left=(0, 3))
    return int(any(result.damaged for result in results))


def verify(path: Path, *, checked: Callable[[int], object]) -> Verification:
    """Hash the files of a checkpoint; calls `checked` with the size of each one when done."""
    began = time.monotonic()
    try:
        sizes = [entry["size"] for _, entry in sorted(read_manifest(path)["files"].items())]
    except UserError:
        sizes = []
    done, problem = 0, None if sizes else manifest.problem_of(path)
    for part, size in enumerate(sizes):
        problem = manifest.problem_of(path, part=part, parts=len(sizes))
        if problem is not None:
            break
        done += size
        checked(size)
    if problem is not None and not path.exists():
        problem = PRUNED
    return Verification(str(path), done, round(time.monotonic() - began, 3), problem)


def _cells(result: Verification) -> tuple[str, ...]:
    rate = f"{size_of(result.bytes / max(result.seconds, 1e-3))}/s"
    outcome = f"damaged, {result.problem}" if result.damaged else result.problem or "intact"
    return Path(result.checkpoint).name, size_of(result.bytes), rate, outcome
