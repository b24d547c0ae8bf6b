"""metrics.jsonl, the truth about a run: one JSON object a step, each step at most once."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from lamda.best_effort import BestEffort
from lamda.durable import replace_file, sync_file

PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "A100": 312e12,
    "GB200": 2500e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip
"""Dense bf16 peaks by a part of the device's name, from the makers' data sheets; the first part that fits counts."""

OTHER_CHIPS = ("Laptop", "MIG", "RTX 4090 D", "TPU v4 lite")
"""Parts of names of devices that share a name above and have less than its peak: a smaller chip, a slice of one."""


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (then there is no MFU)."""
    if any(name in device_name for name in OTHER_CHIPS):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class MetricsFile:
    """Appends finished steps; what a resume made void has moved to metrics.discarded.jsonl.

    A row that the disk does not take is kept and written before the next one.
    """

    def __init__(self, path: Path, *, discarded: Path, step: int) -> None:
        self._path, self._discarded = path, discarded
        self._waiting = b""
        self._writing = BestEffort(f"{path} takes no row", then="rows wait in memory, and training continues")
        self._discarding = BestEffort(f"{discarded} cannot be written", then="the rows that are void now are lost")
        _discard_after(step, path, discarded)
        self._stream = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        with self._writing:
            self._stream.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one step; NaN and infinities, which JSON has not, become null."""
        self._waiting += _line(row).encode()
        self._flush()

    def amend(self, step: int, figures: dict[str, Any]) -> None:
        """Add figures to the row of `step`, if it is the last one."""
        self._flush()
        *before, last = read_metrics(self._path)
        if last["step"] != step:
            return
        with BestEffort(f"{self._path} cannot take the figures of step {step}"):
            replace_file(self._path, "".join(map(_line, [*before, last | figures])))
        self._stream.close()
        self._stream = self._path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Make the rows after `step` void."""
        self._flush()
        self._stream.close()
        self._waiting = b""
        _discard_after(step, self._path, self._discarded, keeping=self._discarding)
        self._stream = self._path.open("ab", buffering=0)

    def _flush(self) -> None:
        with self._writing:
            while self._waiting:
                self._waiting = self._waiting[self._stream.write(self._waiting) :]


def _line(row: dict[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def _discard_after(
    step: int, path: Path, discarded: Path, *, keeping: AbstractContextManager[object] | None = None
) -> None:
    """Move the lines after `step`, and a torn last one, out of the way: a full disk does not stand in it.

    keeping: entered around the writing of `discarded`.
    """
    if not path.exists():
        return
    lines = path.read_text("utf-8").split("\n")
    torn = lines.pop()
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    void = lines[len(kept) :] + ([torn] if torn else [])
    if void:
        with keeping or nullcontext(), discarded.open("a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in void)
        os.truncate(path, sum(len(line.encode()) + 1 for line in kept))
        sync_file(path)
