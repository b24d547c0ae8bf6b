"""The state of a run that must survive a restart, without random state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.data.order import BEGINNING, DataStart
from lamda.data.windows import SourceOrder
from lamda.durable import read_object
from lamda.storage.reading import reading


@dataclass(frozen=True)
class ParkedSource:
    """A source between two stages that read it. rows: used. number, order: see `DataStart` and `SourceOrder`."""

    rows: int = 0
    number: int = 0
    order: SourceOrder = field(default_factory=SourceOrder)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ParkedSource:
        """The inverse of `dataclasses.asdict`. Raises TypeError, ValueError or KeyError for other values."""
        return cls(int(values["rows"]), int(values["number"]), SourceOrder.from_json(values["order"]))


@dataclass(frozen=True)
class RunState:
    """The run after `step` finished steps.

    updates: steps that changed the weights, without skipped steps. consumed: position in the data order.
    samples: cumulative rows. tokens: cumulative target tokens with a loss. skipped: skipped sample ranges [from, to).
    rollbacks: their number. start: where the present text began. order: the windows of each source that contain the
    next samples. fingerprint: the settings and text that the data order depends on; empty if any text may follow.
    stage: number of the stage whose text it is. parked: sources that this stage does not read, by their identity.
    wandb_id: the id of the run in Weights & Biases.
    """

    step: int = 0
    updates: int = 0
    consumed: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0
    start: DataStart = BEGINNING
    order: tuple[SourceOrder, ...] = ()
    fingerprint: dict[str, Any] = field(default_factory=dict)
    stage: int = 1
    parked: dict[str, ParkedSource] = field(default_factory=dict)
    wandb_id: str | None = None

    def after(self, *, consumed: int, rows: int, updated: bool) -> RunState:
        """The state one step later; `with_targets` adds its tokens once they are known."""
        step, updates, samples = self.step + 1, self.updates + updated, self.samples + rows
        return replace(self, step=step, updates=updates, consumed=consumed, samples=samples)

    def with_parked(self, later: Mapping[str, dict[str, Any]]) -> RunState:
        """The state after a return from a later stage, whose own sources continue behind what they have given."""
        parked = dict(self.parked)
        for name, values in later.items():
            source = ParkedSource.from_json(values)
            if name not in parked or source.rows > parked[name].rows:
                parked[name] = source
        return replace(self, parked=parked)

    def with_targets(self, targets: int) -> RunState:
        """The state plus the target tokens of a step."""
        return replace(self, tokens=self.tokens + targets)

    @property
    def takes_any_text(self) -> bool:
        """Whether the next sample may be of any text."""
        return not self.fingerprint and self.start.sample == self.consumed > 0

    def with_fresh_data(self, *, stage: int) -> RunState:
        """The state at the beginning of any text, that of the stage of this number."""
        skipped = tuple(window for window in self.skipped if window[1] <= self.consumed)
        start = DataStart(self.consumed)
        return replace(self, skipped=skipped, start=start, order=(), fingerprint={}, stage=stage, parked={})

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Load what `write` saved. Raises UserError for other content, and UnreadableError."""
        try:
            with reading(path):
                values = read_object(path)
            values["skipped"] = tuple((int(first), int(last)) for first, last in values["skipped"])
            values.pop("cursors", None)  # of format 1, whose data order this version cannot resume
            values["order"] = tuple(map(SourceOrder.from_json, values.get("order", ())))
            if "start" in values:
                values["start"] = DataStart.from_json(values["start"])
            parked = values.get("parked", {})
            values["parked"] = {name: ParkedSource.from_json(each) for name, each in parked.items()}
            return cls(**values)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a run state of this version ({error}); resume with the version that wrote it"
            ) from error
