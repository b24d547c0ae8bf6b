"""A finished step, and its line in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lamda.config.schema import Config
from lamda.engines.protocol import PendingStep, StepMetrics
from lamda.model.counts import flops_per_token
from lamda.storage.state import RunState

OTHER = "other"
"""Stands for all domains whose names were not known at the start."""

Row = dict[str, Any]
"""One step's metrics by name."""


@dataclass
class FinishedStep:
    """A step that the device may still be computing; reading its figures waits for it.

    state: after the step, its targets counted. rate: its learning rate. Seconds: waited for data; stalled by saves
    since the step before; the step's own, data included. epochs: of each source that are over, by name. more: figures
    of evaluations after it.
    """

    state: RunState
    pending: PendingStep
    rate: float
    waited: float
    stalled: float
    seconds: float
    epochs: Mapping[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> StepMetrics:
        """Waits for the step."""
        return self.pending.wait()

    def targets(self) -> int:
        """The targets of this step that had a loss."""
        return sum(targets for _, targets in self.metrics.by_domain())

    def signals(self) -> list[float]:
        """The ranks' sums of what they told with this step."""
        return self.metrics.counters

    def row(self, config: Config, domains: tuple[str, ...], *, peak_flops: float | None, devices: int) -> Row:
        """This step's metrics. domains: names in the order of their numbers. peak_flops: of each of the devices."""
        positions_per_second = config.train.global_batch_size * config.data.sequence_length / self.seconds
        per_token = flops_per_token(config.model, config.data.sequence_length, lora_rank=config.train.lora_rank)
        flops = positions_per_second * per_token / devices
        return {
            "step": self.state.step,
            "loss": self.metrics.loss(),
            "lr": self.rate,
            "grad_norm": self.metrics.grad_norm,
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "tokens_per_second": self.targets() / self.seconds,
            "model_flops_per_second": flops,
            "mfu": flops / peak_flops if peak_flops else None,
            "step_seconds": self.seconds,
            "data_wait_seconds": self.waited,
            "save_seconds": self.stalled,
            "skipped_steps": self.state.step - self.state.updates,
            "rollbacks": self.state.rollbacks,
            "batch_digest": self.metrics.batch_digest,
            **{f"epoch/{name}": epochs for name, epochs in self.epochs.items()},
            **self._domains(domains),
            **self.more,
        }

    def _domains(self, domains: tuple[str, ...]) -> dict[str, float]:
        """`loss/<domain>` and `tokens/<domain>` of this step, where there is more than one domain."""
        if len(domains) < 2:
            return {}
        nats: dict[str, float] = {}
        targets: dict[str, int] = {}
        for name, (loss, count) in zip((*domains, OTHER), self.metrics.by_domain(), strict=True):
            if count:  # a domain of the corpus may be called `other` as well
                nats[name], targets[name] = nats.get(name, 0.0) + loss * count, targets.get(name, 0) + count
        losses = {f"loss/{name}": nats[name] / count for name, count in targets.items()}
        return losses | {f"tokens/{name}": count for name, count in targets.items()}
