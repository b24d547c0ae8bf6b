"""Measurements that anybody can repeat: `python scripts/benchmark.py NAME`, results under `benchmarks/`."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.distributed import choose_accelerator

BENCHMARKS = (
    "attention", "coordinates", "data", "flax", "flax_memory", "generate", "learning", "month", "order", "ranking",
    "summation", "train",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark that the first word names; 0 on success, 2 where the user can mend something."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in BENCHMARKS:
        print(f"usage: benchmark.py NAME ...; there is {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    choose_accelerator()
    try:
        return importlib.import_module(f"benchmarks.{words[0]}").main(words[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def environment(words: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """What a figure is worth nothing without: command, commit, hardware and versions."""
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *words]),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report where `read_report` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """A report that was written. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path} is not there: measure first, without --markdown")
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


def _commit() -> str | None:
    """The commit that this code is at, with `-dirty` where it was changed since; None outside a repository."""
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
