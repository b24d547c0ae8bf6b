"""The state of a run that must survive a restart, without random state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.data.order import BEGINNING, DataStart
from lamda.data.windows import SourceOrder
from lamda.durable import read_object
from lamda.storage.reading import reading


@dataclass(frozen=True)
class RunState:
    """The run after `step` finished steps.

    updates: steps that changed the weights, without skipped steps. consumed: position in the data order.
    samples: cumulative rows. tokens: cumulative target tokens with a loss. skipped: skipped sample ranges [from, to).
    rollbacks: their number. start: where the present text began. order: the windows of each source that contain the
    next samples. fingerprint: the settings and text that the data order depends on; empty if any text may follow.
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
    wandb_id: str | None = None

    def after(self, *, consumed: int, rows: int, updated: bool) -> RunState:
        """The state one step later; `with_targets` adds its tokens once they are known."""
        step, updates, samples = self.step + 1, self.updates + updated, self.samples + rows
        return replace(self, step=step, updates=updates, consumed=consumed, samples=samples)

    def with_targets(self, targets: int) -> RunState:
        """The state plus the target tokens of a step."""
        return replace(self, tokens=self.tokens + targets)

    @property
    def takes_any_text(self) -> bool:
        """Whether the next sample may be of any text."""
        return not self.fingerprint and self.start.sample == self.consumed > 0

    def with_fresh_data(self) -> RunState:
        """The state at the beginning of any text."""
        skipped = tuple(window for window in self.skipped if window[1] <= self.consumed)
        return replace(self, skipped=skipped, start=DataStart(self.consumed), order=(), fingerprint={})

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
            return cls(**values)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a run state of this version ({error}); resume with the version that wrote it"
            ) from error
