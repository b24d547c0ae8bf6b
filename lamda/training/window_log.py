"""The windows of a run's order, a line each in order.jsonl: what `lamda where` finds a row by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.data.windows import SourceOrder


class WindowLog:
    """Appends windows as far as the disk takes them: a missing one is only slower to find."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = BestEffort(f"{path} cannot be written", then="training continues without it")

    def add(self, source: int, order: SourceOrder) -> None:
        """Append the last window of a source that is known."""
        last = SourceOrder(order.windows[-1:], order.measured)
        with self._keeping, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"source": source, **last.to_json()}, separators=(",", ":")) + "\n")


def read_windows(path: Path) -> Mapping[int, list[SourceOrder]]:
    """Of each source the windows that were kept, in rising order; broken lines are left out."""
    found: dict[int, dict[int, SourceOrder]] = {}
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                try:
                    values = json.loads(line)
                    order = SourceOrder.from_json(values)
                    found.setdefault(int(values["source"]), {})[order.windows[0].number] = order
                except (ValueError, TypeError, KeyError, IndexError):
                    continue  # a write that a kill or a full disk cut short
    return {source: [orders[number] for number in sorted(orders)] for source, orders in found.items()}
