"""`lamda pretrain` and `scripts/pretrain.py`: pre-training, with the harness for `eval.tasks` at hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamda.interop.harness import open_benchmarks
from lamda.training.main import launch

if TYPE_CHECKING:
    from lamda.training.task import Task


def main(argv: Sequence[str] | None = None) -> int:
    """Run pre-training; returns the exit code, as `lamda.training.main.launch`."""
    return launch(argv, _task, open_benchmarks)


def _task() -> Task:
    from lamda.training.pretraining import Pretraining

    return Pretraining()


if __name__ == "__main__":
    sys.exit(main())
