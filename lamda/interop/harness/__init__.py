"""EleutherAI's evaluation harness (`lm_eval`): `lamda eval`, and `eval.tasks` of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamda.config.schema import Config
from lamda.distributed import World

if TYPE_CHECKING:
    from lamda.interop.harness.in_training import TrainingBenchmarks


def open_benchmarks(config: Config, world: World) -> TrainingBenchmarks | None:
    """The tasks of `eval.tasks` with their data, or None without tasks; every rank calls it.

    Raises UserError if a task or its data is not available. See `lamda.training.task.OpenBenchmarks`.
    """
    if not config.eval.tasks:
        return None
    from lamda.interop.harness.in_training import TrainingBenchmarks

    return TrainingBenchmarks.open(config, world)
