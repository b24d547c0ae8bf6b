"""`lamda finetune` and `scripts/finetune.py`: fine-tuning, with lm-eval for `eval.tasks`."""

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
    """The options of `lamda finetune`: those of a configuration."""
    return ConfigParser("lamda finetune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run fine-tuning; returns the exit code, as `lamda.launch.main.launch`."""
    return launch(argv, _task, DeepSpeed(), open_benchmarks)


def _task() -> Task:
    from lamda.dialog.finetuning import Finetuning

    return Finetuning()


if __name__ == "__main__":
    sys.exit(main())
