"""How a start of a run ended.

status.json tells it, not the launcher's exit code, which is 0 where DeepSpeed's launcher was killed.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import BY_FILE, STOP_EXIT

MISTAKE_EXIT = 2
RESTARTS = 3
"""Restarts in a row that may come to nothing: to no newer checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a start ended, why, and whether that was asked for by `touch RUN/STOP`."""

    kind: Literal["finished", "mistake", "stopped", "failed"]
    reason: str
    by_file: bool = False


def outcome(code: int, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> Outcome:
    """What became of a start of the run.

    code: the launcher's exit code (negative: a signal). before, after: the run's status around the start. A
    finished run that is started again writes none.
    """
    news = after if after != before else {}
    reason = _reason(code, news)
    if (news or (after if code == 0 else {})).get("status") == "finished":
        return Outcome("finished", reason)
    if code == MISTAKE_EXIT:
        return Outcome("mistake", reason)
    # Saved, but with a launcher that was killed or says 0: nobody asked, the ranks had lost their launcher.
    # Before the first step, too: a launcher ends the ranks by SIGTERM where one of them was killed.
    if code == STOP_EXIT or (news.get("status") == "preempted" and "step" in news and code > 0):
        return Outcome("stopped", reason, by_file=news.get("reason") == BY_FILE)
    return Outcome("failed", reason)


def status_of(directory: RunDirectory) -> dict[str, Any]:
    """status.json, empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        return directory.read_status()
    return {}


def saved_step(directory: RunDirectory) -> int:
    """The newest complete checkpoint's step, 0 where there is none."""
    with suppress(OSError, ValueError):
        return int((directory.checkpoints / "LATEST").read_text("utf-8").strip().removeprefix("step-"))
    return 0


def signal_name(number: int) -> str:
    """`SIGTERM`, or the number where it has no name."""
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _reason(code: int, news: Mapping[str, Any]) -> str:
    """Why the run ended, in one line."""
    how = f"signal {signal_name(-code)}" if code < 0 else f"exit code {code}"
    if "reason" in news:
        return f"{shorten(str(news['reason']), width=200, placeholder=' ...')} ({how})"
    return f"it ended without a word, {how}" if news else f"the command ended before the run began, {how}"
