"""What must survive a restart, in one small object. No random state is among it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.data.windows import SourceOrder
from lamda.durable import read_object
from lamda.storage.reading import reading


@dataclass(frozen=True)
class RunState:
    """The run after `step` finished steps.

    updates: steps that changed the weights (a refused one did not). consumed: place in the order of
    samples. samples: cumulative rows. tokens: cumulative targets that had a loss. skipped: windows [from, to)
    of the order that are jumped over. rollbacks: how often the run went back. order: the windows of each source
    that the next samples are in. fingerprint: what the order depends on. wandb_id: the run's one id in Weights &
    Biases.
    """

    step: int = 0
    updates: int = 0
    consumed: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0
    order: tuple[SourceOrder, ...] = ()
    fingerprint: dict[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None

    def after(self, *, consumed: int, rows: int, updated: bool) -> RunState:
        """The state one step later; its targets are added when they are known (`with_targets`)."""
        return replace(
            self,
            step=self.step + 1,
            updates=self.updates + updated,
            consumed=consumed,
            samples=self.samples + rows,
        )

    def with_targets(self, targets: int) -> RunState:
        """The state with the targets of a step that had a loss."""
        return replace(self, tokens=self.tokens + targets)

    def write(self, path: Path) -> None:
        """Save as JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        path.write_text(json.dumps({**values, "order": [each.to_json() for each in self.order]}), "utf-8")

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Load what `write` saved. Raises UserError where the file holds anything else, and UnreadableError."""
        try:
            with reading(path):
                values = read_object(path)
            values["skipped"] = tuple((int(first), int(last)) for first, last in values["skipped"])
            values.pop("cursors", None)  # of format 1, whose order this version does not continue (`resume`)
            values["order"] = tuple(map(SourceOrder.from_json, values.get("order", ())))
            return cls(**values)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: is no state of a run of this version ({error}); the version that wrote it can resume from it"
            ) from error
