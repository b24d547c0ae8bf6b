"""Reproducible benchmarks: `python scripts/benchmark.py NAME`, with results in `benchmarks/`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.distributed import choose_accelerator

BENCHMARKS = (
    "attention", "audit", "coordinates", "data", "flax", "flax_memory", "generate", "learning", "month", "order",
    "ranking", "summation", "train",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first word names; 0 on success, 2 on errors that the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in BENCHMARKS:
        print(f"usage: benchmark.py NAME ...; NAME is one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    choose_accelerator()
    try:
        return importlib.import_module(f"benchmarks.{words[0]}").main(words[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def new_parser(name: str, *, takes_config: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that `report` needs. takes_config: other words are a configuration."""
    epilog = "--config FILE and --section.key VALUE as in pretrain.py" if takes_config else None
    parser = argparse.ArgumentParser(prog=f"benchmark.py {name}", allow_abbrev=False, epilog=epilog)
    file = Path(f"benchmarks/{name}.json")
    parser.add_argument("--json", metavar="FILE", type=Path, default=file, help="the report (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the tables of --json FILE")
    return parser


def report(
    options: argparse.Namespace,
    words: Sequence[str],
    packages: Sequence[str],
    measure: Callable[[], dict[str, Any] | None],
    markdown: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, write the report as JSON, and print it; `measure` gives None on ranks that do not report. Returns 0."""
    if not options.markdown:
        facts, measured = environment(words, packages), measure()
        if measured is None:
            return 0
        write_report(options.json, facts | measured)
    print(markdown(read_report(options.json)))
    return 0


def environment(words: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """The context of a measurement: command, commit, hardware and versions."""
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *words]),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report for `read_report`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written. Raises UserError if there is none."""
    if not path.exists():
        raise UserError(f"{path} does not exist: measure first, without --markdown")
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


def _commit() -> str | None:
    """The commit of this code, with `-dirty` if it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
