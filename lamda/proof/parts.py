"""The parts of a proof, most valuable first, and the process that runs one.

`python -m lamda.proof.parts NAME FOLDER [--rehearse]`, which lives as long as its standard input is open.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FINDINGS = "parts"
"""Folder of the parts' files, in that of the proof."""
TEXT = "text"
"""Folder of the runs' text there."""
REHEARSE = "--rehearse"


class Part(NamedTuple):
    """A part. function: its module in this package, and its name there. seconds: the most that it may take."""

    title: str
    function: str
    seconds: float


PARTS: dict[str, Part] = {
    "environment": Part("Environment", "environment.measure", 45),
    "equality": Part("Attention against float64", "equality.measure", 120),
    "rate": Part("GEMM rate", "step.measure_rate", 60),
    "kernels": Part("Attention kernels", "kernels.measure", 180),
    "step-1024": Part("Training step, short rows", "step.measure_short", 200),
    "step-2048": Part("Training step, long rows", "step.measure_long", 200),
    "checkpoint": Part("Checkpoint", "checkpoint.measure", 200),
    "resume": Part("Stop and exact resume", "runs.resume", 150),
    "learn": Part("Learning", "runs.learn", 150),
}


def findings_file(folder: Path, name: str) -> Path:
    """Where part `name` keeps its findings."""
    return folder / FINDINGS / f"{name}.json"


def main(argv: Sequence[str]) -> int:
    """Run one part in this process."""
    from lamda.config.errors import UserError
    from lamda.proof.findings import Findings
    from lamda.proof.sizes import GPU, REHEARSAL

    name, folder, *rest = argv
    module, function = PARTS[name].function.split(".")
    sizes = REHEARSAL if REHEARSE in rest else GPU
    findings = Findings(findings_file(Path(folder), name))
    try:
        getattr(importlib.import_module(f"lamda.proof.{module}"), function)(sizes, findings, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def die_with_parent() -> None:
    """Kill this session when its standard input closes: the proof that holds the other end is gone.

    Else a part, and the runs that it has started, would keep the GPU.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
