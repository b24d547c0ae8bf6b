"""`eval.tasks` in the midst of training: rank 0 runs lm-eval, and all ranks compute what it asks, in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World, broadcast, gather, on_main
from lamda.engines.deepspeed.engine import Engine as DeepSpeedEngine
from lamda.engines.protocol import Engine
from lamda.interop.harness.scoring import Prompt, Row, Score, continue_prompts, score_rows
from lamda.interop.harness.tasks import Tasks, figures
from lamda.training.task import Mark, Shows, TaskError

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class TasksOfRun:
    """See `lamda.training.task.Benchmarks`. tasks: on rank 0 alone, which alone needs lm-eval and the data."""

    config: Config
    world: World
    tasks: Tasks | None

    @classmethod
    def open(cls, config: Config, world: World) -> TasksOfRun:
        """Load the tasks of `eval.tasks`; every rank calls it. Raises UserError."""
        folder = None if config.eval.tasks_path is None else Path(config.eval.tasks_path)
        held: list[Tasks] = []

        def load() -> None:
            try:
                held.append(Tasks.load(config.eval.tasks, folder=folder))
            except UserError as error:
                raise UserError(f"eval.tasks: {error}") from error

        on_main(world, load)
        return cls(config, world, held[0] if held else None)

    def score(self, engine: Engine, tokenizer: Tokenizer, *, mark: Mark, shows: Shows) -> dict[str, float]:
        """Score the model as it stands, on rank 0 with the figures; the other ranks get none."""
        assert isinstance(engine, DeepSpeedEngine), "other frameworks reject eval.tasks"
        decoder = RanksDecoder(engine, tokenizer, mark=mark)
        if self.tasks is None:
            decoder.serve()
            return {}
        from lamda.interop.harness.language_model import HarnessModel

        model = HarnessModel(decoder, tokenizer, sequence_length=self.config.data.sequence_length, shows=shows)
        try:
            results = self.tasks.run_in_training(model, limit=self.config.eval.tasks_limit)
        except Exception as error:
            if decoder.is_computing:
                raise
            raise TaskError(f"{type(error).__name__}: {error}") from error
        finally:
            if not decoder.is_computing:
                decoder.dismiss()
        return {
            f"eval/{task}/{name}": value for task, named in figures(results).items() for name, value in named.items()
        }


class RanksDecoder:
    """A model under DeepSpeed: each batch is dealt among the ranks, which all go through the model equally often.

    Rank 0 calls `score` and `generate`, then `dismiss`; the others `serve` in the meantime. is_computing: whether a
    batch is on its way; where an error ends it, the ranks are no longer in step.
    """

    def __init__(self, engine: DeepSpeedEngine, tokenizer: Tokenizer, *, mark: Mark) -> None:
        self._engine, self._tokenizer, self._mark = engine, tokenizer, mark
        self._own = engine.config.train.micro_batch_size
        self.batch = self._own * engine.world.size
        self.is_computing = False

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """See `lamda.interop.harness.scoring.Decoder`."""
        return self._share(list(rows))

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `lamda.interop.harness.scoring.Decoder`."""
        return self._share(list(prompts))

    def serve(self) -> None:
        """Compute what rank 0 asks for, until it dismisses."""
        while (items := broadcast(None)) is not None:
            gather(self._compute(items))

    def dismiss(self) -> None:
        """Let the other ranks go on."""
        broadcast(None)

    def _share(self, items: list[Row] | list[Prompt]) -> list:
        self.is_computing = True
        broadcast(items)
        parts = gather(self._compute(items))
        self.is_computing = False
        size = self._engine.world.size
        return [parts[place % size][place // size] for place in range(len(items))]

    def _compute(self, items: list[Row] | list[Prompt]) -> list[Score] | list[str]:
        """This rank's results: of every n-th item, n being the number of ranks."""
        self._mark()
        world = self._engine.world
        own = items[world.rank :: world.size]
        if isinstance(items[0], Row):
            # The forward pass gathers weights at ZeRO stage 3: a rank without rows goes through it as well.
            found = score_rows(self._logits, own or items[:1], device=self._engine.device)
            return found[: len(own)]
        if self._engine.stage < 3:
            return continue_prompts(self._engine.model, self._tokenizer, own) if own else []
        with self._engine.gathered_parameters():
            written = continue_prompts(self._engine.model, self._tokenizer, items)
        return written[world.rank :: world.size]

    def _logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        return self._engine.deepspeed(inputs_BL)
