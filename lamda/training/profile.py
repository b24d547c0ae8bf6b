"""A trace of some steps (`train.profile`) in the run directory, which ui.perfetto.dev opens."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

from lamda.best_effort import BestEffort


class Profile:
    """Records steps `steps[0]` to `steps[1]`; use it as a context, which writes what it has at the end of a run."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._running: torch.profiler.profile | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def begin(self, step: int) -> None:
        """Step `step` comes next."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = torch.profiler.profile(activities=activities)
            self._running.start()

    def end(self, step: int) -> None:
        """Step `step` is done."""
        if self._steps is not None and step == self._steps[1]:
            self._write()

    def _write(self) -> None:
        if self._running is None:
            return
        first, last = self._steps
        running, self._running = self._running, None
        with BestEffort(f"{self._folder}: the trace cannot be written", errors=Exception):
            running.stop()
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"steps-{first}-to-{last}.json.gz"))
