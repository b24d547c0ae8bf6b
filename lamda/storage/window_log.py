"""The windows of a run's sample order, one per line of order.jsonl; `lamda trace` looks rows up in it."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.data.order import BEGINNING, DataStart
from lamda.data.windows import SourceOrder

_BEGINNING = re.compile(rb'{"source":(\d{1,9}),"windows":\[{"number":(\d{1,18}),"epoch":\d+,"base":(\d{1,18}),')
"""The beginning of a line: enough to look it up without parsing the cursors of all lanes."""


class WindowLog:
    """Appends windows; where the disk is full a window is missing, and only slower to find."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = BestEffort(f"{path} cannot be written", then="training continues without it")

    def begin(self, orders: Sequence[SourceOrder], start: DataStart = BEGINNING) -> None:
        """Append the windows of each source in a checkpoint, which may be another run's."""
        for source, order in enumerate(orders):
            if order.windows:
                self._append(start.number(source), order)

    def add(self, source: int, order: SourceOrder) -> None:
        """Append the last known window of a source. source: its number (`DataStart.number`)."""
        self._append(source, SourceOrder(order.windows[-1:], order.measured))

    def _append(self, source: int, order: SourceOrder) -> None:
        with self._keeping, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"source": source, **asdict(order)}, separators=(",", ":")) + "\n")


class KeptWindows:
    """The windows that a WindowLog wrote, read on demand: those of a long run take hundreds of megabytes."""

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
        self._places = {source: sorted(by_number.values()) for source, by_number in places.items()}

    def up_to(self, source: int, row: int, *, lanes: int) -> SourceOrder:
        """The last windows of a source with `lanes` lanes that begin at or before a row; empty if there are none."""
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
