"""`eval.tasks` during training: rank 0 runs lm-eval, and all ranks compute its requests in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World, broadcast, gather, on_main
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.engines.protocol import Engine
from lamda.interop.harness.scoring import Prompt, Score, ScoredRow, continue_prompts, score_rows
from lamda.interop.harness.tasks import Tasks, task_metrics
from lamda.training.task import BenchmarkError, Mark, ShowProgress

Items = list[ScoredRow] | list[Prompt]


@dataclass(frozen=True)
class TrainingBenchmarks:
    """See `lamda.training.task.Benchmarks`. tasks: on rank 0, the only rank that needs lm-eval and the data."""

    config: Config
    world: World
    tasks: Tasks | None

    @classmethod
    def open(cls, config: Config, world: World) -> TrainingBenchmarks:
        """Load the tasks of `eval.tasks`; every rank calls it. Raises UserError."""
        folder = None if config.eval.tasks_path is None else Path(config.eval.tasks_path)
        loaded: list[Tasks] = []

        def load() -> None:
            try:
                loaded.append(Tasks.load(config.eval.tasks or (), folder=folder))
            except UserError as error:
                raise UserError(f"eval.tasks: {error}") from error

        on_main(world, load)
        return cls(config, world, loaded[0] if loaded else None)

    def score(
        self, engine: Engine, tokenizer: Tokenizer, *, mark: Mark, show_progress: ShowProgress
    ) -> dict[str, float]:
        """Score the current model; rank 0 gets the metrics, other ranks none."""
        assert isinstance(engine, DeepSpeedEngine), "other frameworks reject eval.tasks"
        decoder = RanksDecoder(engine, tokenizer, mark=mark)
        if self.tasks is None:
            decoder.serve()
            return {}
        from lamda.interop.harness.language_model import HarnessModel

        model = HarnessModel(
            decoder, tokenizer, sequence_length=self.config.data.sequence_length, show_progress=show_progress
        )
        try:
            results = self.tasks.run_in_training(model, limit=self.config.eval.tasks_limit)
        except Exception as error:
            if decoder.is_computing:
                raise
            raise BenchmarkError(f"{type(error).__name__}: {error}") from error
        finally:
            if not decoder.is_computing:
                decoder.dismiss()
        by_task = task_metrics(results).items()
        return {f"eval/{task}/{name}": value for task, named in by_task for name, value in named.items()}


class RanksDecoder:
    """A model under DeepSpeed: each batch is divided among the ranks, which all run the model equally often.

    Rank 0 calls `score` and `generate`, then `dismiss`; meanwhile the other ranks `serve`. is_computing: whether a
    batch is in progress; after an error then, the ranks are out of step.
    """

    def __init__(self, engine: DeepSpeedEngine, tokenizer: Tokenizer, *, mark: Mark) -> None:
        self._engine, self._tokenizer, self._mark = engine, tokenizer, mark
        self.batch = engine.config.train.micro_batch_size * engine.world.world_size
        self.is_computing = False

    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """See `lamda.interop.harness.scoring.Decoder`."""
        return self._share(list(rows))

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `lamda.interop.harness.scoring.Decoder`."""
        return self._share(list(prompts))

    def serve(self) -> None:
        """Compute batches of rank 0 until it calls `dismiss`."""
        while (items := broadcast(None)) is not None:
            gather(self._compute(items))

    def dismiss(self) -> None:
        """Let the other ranks return from `serve`."""
        broadcast(None)

    def _share(self, items: Items) -> list[Any]:
        self.is_computing = True
        broadcast(items)
        parts = gather(self._compute(items))
        self.is_computing = False
        size = len(parts)
        return [parts[place % size][place // size] for place in range(len(items))]

    def _compute(self, items: list[Any]) -> list[Score] | list[str]:
        """The results of this rank's items: every n-th of them, for n ranks."""
        self._mark()
        world = self._engine.world
        local = items[world.rank :: world.world_size]
        if isinstance(items[0], ScoredRow):
            # The forward pass gathers weights at ZeRO stage 3: a rank without rows must run it too.
            return score_rows(self._engine.deepspeed, local or items[:1], device=self._engine.device)[: len(local)]
        if self._engine.stage < 3:
            return continue_prompts(self._engine.model, self._tokenizer, local) if local else []
        with self._engine.gathered_parameters():
            written = continue_prompts(self._engine.model, self._tokenizer, items)
        return written[world.rank :: world.world_size]
