"""EleutherAI's evaluation harness (`lm_eval`) around our decoder: `lamda eval`, and `eval.tasks` of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamda.config.schema import Config
from lamda.distributed import World

if TYPE_CHECKING:
    from lamda.interop.harness.in_training import TasksOfRun


def open_benchmarks(config: Config, world: World) -> TasksOfRun | None:
    """The tasks of `eval.tasks` with their data, None where there are none; every rank calls it.

    Raises UserError where a task or its data cannot be had. See `lamda.training.task.OpenBenchmarks`.
    """
    if not config.eval.tasks:
        return None
    from lamda.interop.harness.in_training import TasksOfRun

    return TasksOfRun.open(config, world)
