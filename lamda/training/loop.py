"""The training loop: fetch, step, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.data.held_out import HeldOut
from lamda.data.loader import Loader, Step, merge_cursors
from lamda.data.quarantine import write_first
from lamda.distributed import World, gather
from lamda.model.counts import flops_per_token
from lamda.model.loss import token_nats
from lamda.training import checkpoint
from lamda.training.engine import Engine, StepResult
from lamda.training.evaluation import Scores, evaluate
from lamda.training.metrics import peak_flops
from lamda.training.run_directory import RunDirectory
from lamda.training.schedule import learning_rate
from lamda.training.state import RunState

OTHER = "other"
"""Stands for all domains whose names were not known at the start."""

Report = Callable[[dict[str, Any]], None]
"""Takes a finished step's row of metrics."""


@dataclass
class Run:
    """A run in progress: its parts, and the state that the next checkpoint saves."""

    config: Config
    world: World
    directory: RunDirectory
    engine: Engine
    loader: Loader
    held_out: HeldOut | None
    domains: tuple[str, ...]
    state: RunState

    def train(self, report: Report, *, notice: Callable[[str], None]) -> Scores | None:
        """Go on to the last step. `report` gets each step's metrics once the next one is under way.

        Returns the last evaluation, of all held-out text, where there is any.
        """
        pending: _Pending | None = None
        scores: Scores | None = None
        for batch, waited, began in _timed(self.loader, steps=self.config.steps - self.state.step):
            current = self._step(batch, waited=waited, began=began)
            if pending is not None:
                report(pending.row())
            pending = current
            if self._evaluation_is_due():
                scores = self.evaluate()
                pending.more = scores.metrics()
            if self._checkpoint_is_due():
                report(pending.row())
                pending = None
                notice(f"saved {self.save()}")
        return scores

    def evaluate(self) -> Scores:
        """Score the held-out text: all of it at the last step, the first `eval.batches` batches before."""
        rows = None if self._is_last else self.config.eval.batches * self.config.train.global_batch_size

        def nats(inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
            return token_nats(self.engine.deepspeed(inputs_BL), targets_BL)

        with self.engine.evaluating():
            return evaluate(
                self.held_out,
                nats,
                device=self.engine.device,
                micro_batch=self.config.train.micro_batch_size,
                rank=self.world.rank,
                world=self.world.size,
                rows=rows,
                total=self._total,
            )

    def save(self) -> str:
        """Write a checkpoint of this step and return its path."""
        cursors = merge_cursors(gather(self.loader.cursors(self.state.consumed)))
        quarantined = gather(self.loader.quarantined())
        if self.world.is_main:
            write_first(self.directory.quarantine, chain.from_iterable(quarantined))
        path = checkpoint.save(
            self.directory.checkpoints,
            engine=self.engine,
            state=replace(self.state, cursors=cursors),
            keep=self.config.checkpoint.keep,
            config_yaml=to_yaml(self.config),
            tokenizer=self.directory.tokenizer,
        )
        return str(path)

    def _step(self, batch: Step, *, waited: float, began: float) -> _Pending:
        config = self.config
        rate = learning_rate(self.state.step + 1, train=config.train, steps=config.steps)
        result = self.engine.step(batch, learning_rate=rate)
        rows = config.train.global_batch_size
        self.state = self.state.after(
            consumed=batch.consumed, rows=rows, targets=rows * config.data.sequence_length, updated=result.updated
        )
        return _Pending(self, self.state, result, rate, waited, time.monotonic() - began)

    @property
    def _is_last(self) -> bool:
        return self.state.step == self.config.steps

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval.every
        return self.held_out is not None and (self._is_last or (every is not None and self.state.step % every == 0))

    def _checkpoint_is_due(self) -> bool:
        return self._is_last or self.state.step % self.config.checkpoint.every == 0

    def _total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        tensor = torch.from_numpy(sums).to(self.engine.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


@dataclass
class _Pending:
    """A step that may still be computed; `row` waits for it."""

    run: Run
    state: RunState
    result: StepResult
    rate: float
    waited: float
    seconds: float
    more: dict[str, float] | None = None

    def row(self) -> dict[str, Any]:
        """This step's line in metrics.jsonl."""
        config, device = self.run.config, self.result.sums.device
        tokens_per_second = config.train.global_batch_size * config.data.sequence_length / self.seconds
        flops = tokens_per_second * flops_per_token(config.model, config.data.sequence_length) / self.run.world.size
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return {
            "step": self.state.step,
            "loss": self.result.loss(),
            "lr": self.rate,
            "grad_norm": float(self.result.grad_norm),
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": flops,
            "mfu": flops / peak if peak else None,
            "step_seconds": self.seconds,
            "data_wait_seconds": self.waited,
            "skipped_steps": self.state.step - self.state.updates,
            "batch_digest": self.result.batch_digest(),
            **self._domains(),
            **(self.more or {}),
        }

    def _domains(self) -> dict[str, float]:
        """`loss/<domain>` and `tokens/<domain>` of this step, where there is more than one domain."""
        names = [*self.run.domains, OTHER]
        parts = {name: part for name, part in zip(names, self.result.by_domain(), strict=True) if part[1]}
        if len(self.run.domains) < 2:
            return {}
        losses = {f"loss/{name}": loss for name, (loss, _) in parts.items()}
        return losses | {f"tokens/{name}": targets for name, (_, targets) in parts.items()}


def _timed(loader: Loader, *, steps: int) -> Iterator[tuple[Step, float, float]]:
    """Batches with the seconds that they were waited for, and when the waiting began."""
    batches = iter(loader)
    for _ in range(steps):
        began = time.monotonic()
        batch = next(batches)
        yield batch, time.monotonic() - began, began
