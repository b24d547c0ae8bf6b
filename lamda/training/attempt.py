"""What status.json says of one start of a run, from the moment the run directory is its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from lamda.distributed import World, on_main
from lamda.storage.run_directory import STARTING, RunDirectory
from lamda.training.stop_requests import STOP_EXIT

ENDS = {"finished": 0, "preempted": STOP_EXIT, "failed": 1}
"""How a start can end, and its exit code."""


class Attempt:
    """A start of a run. Any rank may say how it ended; the first word stays, for the others follow from it.

    found: status.json as it was before. is_training: whether the start is over.
    """

    def __init__(self, directory: RunDirectory, world: World) -> None:
        self.found: dict[str, Any] = {}
        self.is_training = False
        self._directory, self._world = directory, world
        self._began, self.found = on_main(world, lambda: (time.time(), directory.read_status()))

    def begin(self) -> None:
        """Say that the run is starting, unless a rank has ended it already. Every rank calls it."""

        def say() -> None:
            if self.exit_code() is None:
                self._directory.write_status("running", phase=STARTING)

        on_main(self._world, say)

    def train(self, *, step: int, steps: int) -> None:
        """The start is over, the run trains from `step` on."""
        self.is_training = True
        if self._world.is_main:
            self._directory.write_status("running", step=step, steps=steps)

    def end(self, status: Literal["finished", "preempted", "failed"], **details: Any) -> None:
        """Write how it ended, unless that was written already."""
        if self.exit_code() is None:
            self._directory.write_status(status, **details)

    def refuse(self, reason: str) -> None:
        """A start that was refused changes nothing: what was written about the run before stands again."""
        if self._world.is_main:
            if self.found:
                self._directory.restore_status(self.found)
            else:
                self._directory.write_status("failed", reason=reason)

    def exit_code(self) -> int | None:
        """That of the end that some rank has written; None where none has."""
        said = self._directory.read_status()
        return ENDS.get(said.get("status", "")) if said.get("time", 0.0) >= self._began else None

    def leave_by_signal(self) -> Callable[[str], None]:
        """What writes that a signal ended the start, by its name."""
        return lambda name: self.end("preempted", reason=f"{name} before the first step: nothing has changed")
