"""`lamda pretrain` and `scripts/pretrain.py`: pre-training under DeepSpeed, with lm-eval for `eval.tasks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lamda.config.help import ConfigParser
from lamda.engines.deepspeed.framework import DeepSpeed
from lamda.interop.harness import open_benchmarks
from lamda.launch.main import launch

if TYPE_CHECKING:
    from lamda.training.task import Task


def parser() -> ConfigParser:
    """The options of `lamda pretrain`: those of a configuration."""
    return ConfigParser("lamda pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run pre-training; returns the exit code, as `lamda.launch.main.launch`."""
    return launch(argv, pretraining, DeepSpeed(), open_benchmarks)


def pretraining() -> Task:
    """The task; imports torch."""
    from lamda.training.task import Pretraining

    return Pretraining()


if __name__ == "__main__":
    sys.exit(main())
