"""The windows of a run's order, a line each in order.jsonl: what `lamda trace` finds a row by."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.data.windows import SourceOrder

_BEGINNING = re.compile(rb'{"source":(\d{1,9}),"windows":\[{"number":(\d{1,18}),"epoch":\d+,"base":(\d{1,18}),')
"""Of a line: what it is found by, without reading the cursors of all lanes after it."""


class WindowLog:
    """Appends windows as far as the disk takes them: a missing one is only slower to find."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = BestEffort(f"{path} cannot be written", then="training continues without it")

    def begin(self, orders: Sequence[SourceOrder]) -> None:
        """Append the windows of each source that a checkpoint brings: it may be another run's."""
        for source, order in enumerate(orders):
            if order.windows:
                self._append(source, order)

    def add(self, source: int, order: SourceOrder) -> None:
        """Append the last window of a source that is known."""
        self._append(source, SourceOrder(order.windows[-1:], order.measured))

    def _append(self, source: int, order: SourceOrder) -> None:
        with self._keeping, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"source": source, **order.to_json()}, separators=(",", ":")) + "\n")


class KeptWindows:
    """The windows that a WindowLog wrote, read when they are asked for: a long run's are hundreds of megabytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        places: dict[int, dict[int, tuple[int, int, int]]] = {}
        if path.exists():
            with path.open("rb") as stream:
                offset = 0
                for line in stream:
                    if begins := _BEGINNING.match(line):
                        source, number, base = map(int, begins.groups())
                        places.setdefault(source, {})[number] = base, number, offset  # a resumed run writes some again
                    offset += len(line)
        self._places = {source: sorted(found.values()) for source, found in places.items()}

    def up_to(self, source: int, row: int, *, lanes: int) -> SourceOrder:
        """The last kept windows of a source of so many lanes that begin at a row or before it; none if none are."""
        places = self._places.get(source, [])
        for _, _, offset in reversed(places[: bisect_right(places, row, key=lambda place: place[0])]):
            with self._path.open("rb") as stream:
                stream.seek(offset)
                line = stream.readline()
            try:
                order = SourceOrder.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a write that a kill or a full disk cut short
            if all(len(window.counts) == lanes for window in order.windows):
                return order
        return SourceOrder()
