"""How a start of a run ended, and whether to start it again. Batch scripts call this before and after each start.

`python -m lamda.cluster.restarts begin RUN STATE RESTARTS` before, `... end RUN STATE CODE [--warned]` after. STATE
is the job's folder: the status before the start, the exit code of each node, and the number of fruitless restarts.
The outcome comes from status.json: DeepSpeed's launcher exits with 0 if it was killed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from lamda import console
from lamda.storage.lock import STALE_SECONDS
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import BY_FILE, STOP_EXIT

USER_ERROR_EXIT = 2
MAX_RESTARTS = 3
"""Consecutive restarts without a newer checkpoint before giving up."""
REQUEUE_EXIT = 99
"""Exit code of `end` if the job should be requeued."""
POLL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Arguments as above; returns the exit code for the job, REQUEUE_EXIT if it should start again."""
    parser = argparse.ArgumentParser(prog="lamda.cluster.restarts", allow_abbrev=False)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("--warned", action="store_true")
    options = parser.parse_args(argv)
    console.outlive()
    directory = RunDirectory(options.run)
    if options.moment == "begin":
        begin(directory, options.state, restarts=options.number)
        return 0
    return end(directory, options.state, code=options.number, warned=options.warned)


def begin(directory: RunDirectory, state: Path, *, restarts: int) -> None:
    """Record the status of the run, and wait for the previous start of this job to end on its node."""
    deadline = time.monotonic() + STALE_SECONDS
    if restarts and (host := directory.writer_elsewhere()):
        _say(f"waiting until rank 0 on {host} has been silent for {STALE_SECONDS} s")
        while directory.writer_elsewhere() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for file in state.glob("exit-*"):
        file.unlink()
    (state / "before.json").write_text(json.dumps(directory.read_status()), "utf-8")


def end(directory: RunDirectory, state: Path, *, code: int, warned: bool) -> int:
    """Decide how the job continues, and print it.

    code: of the job step; the code of each node is in STATE/exit-*. warned: whether the batch script asked the run
    to stop because the scheduler's time limit or preemption was near.
    """
    before = json.loads((state / "before.json").read_text("utf-8"))
    ended = outcome(_decisive_code(state, code), before=before, after=directory.read_status())
    saved = saved_step(directory)
    if ended.kind == "finished":
        _say("finished")
        return 0
    if ended.kind == "mistake":
        _say("not started again: it would fail again; the reason is in each node's log")
        return USER_ERROR_EXIT
    if ended.kind == "stopped" and ended.by_file and not warned:
        _say(f"stopped by RUN/STOP at step {saved}; `lamda submit` resumes it")
        return STOP_EXIT
    if ended.kind == "failed" and not _may_restart(state, saved):
        _say(f"gave up: {MAX_RESTARTS} restarts in a row without a checkpoint newer than step {saved}: {ended.reason}")
        return 1
    _say(f"{ended.kind}: {ended.reason}; restarting from {f'step {saved}' if saved else 'the beginning'}")
    return REQUEUE_EXIT


def _decisive_code(state: Path, code: int) -> int:
    """The exit code that counts: the code of a node that was killed because another one failed says nothing."""
    codes = {int(file.read_text("utf-8")) for file in state.glob("exit-*")}
    return next((known for known in (USER_ERROR_EXIT, STOP_EXIT) if known in codes), code)


def _may_restart(state: Path, saved: int) -> bool:
    """Count a failure; False after too many in a row without a newer checkpoint."""
    file = state / "failures.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {"saved": saved, "fruitless": 0}
    fruitless = known["fruitless"] if saved <= known["saved"] else 0
    file.write_text(json.dumps({"saved": max(saved, known["saved"]), "fruitless": fruitless + 1}), "utf-8")
    return fruitless < MAX_RESTARTS


def _say(text: str) -> None:
    print(f"job: {text}", flush=True)


@dataclass(frozen=True)
class Outcome:
    """How a start ended, why, and whether `touch RUN/STOP` requested it."""

    kind: Literal["finished", "mistake", "stopped", "failed"]
    reason: str
    by_file: bool = False


def outcome(code: int, *, before: Mapping[str, Any], after: Mapping[str, Any]) -> Outcome:
    """The outcome of a start.

    code: the launcher's exit code (negative: a signal). before, after: the status of the run around the start; a
    finished run that is started again writes none.
    """
    written = after if after != before else {}
    reason = _reason(code, written)
    if (written or (after if code == 0 else {})).get("status") == "finished":
        return Outcome("finished", reason)
    if code == USER_ERROR_EXIT:
        return Outcome("mistake", reason)
    # A preempted status alone is not a requested stop: ranks save when they lose their launcher (killed, or exit
    # code 0), and before the first step the launcher ends them with SIGTERM if one of them was killed.
    if code == STOP_EXIT or (written.get("status") == "preempted" and "step" in written and code > 0):
        return Outcome("stopped", reason, by_file=written.get("reason") == BY_FILE)
    return Outcome("failed", reason)


def saved_step(directory: RunDirectory) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    with suppress(OSError, ValueError):
        return int((directory.checkpoints / "LATEST").read_text("utf-8").strip().removeprefix("step-"))
    return 0


def signal_name(number: int) -> str:
    """`SIGTERM`, or the number of a signal without a name."""
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def exit_text(code: int) -> str:
    """How a process ended, by its exit code (negative: a signal)."""
    return f"signal {signal_name(-code)}" if code < 0 else f"exit code {code}"


def _reason(code: int, status: Mapping[str, Any]) -> str:
    """Why the run ended, in one line."""
    if "reason" in status:
        return f"{shorten(str(status['reason']), width=200, placeholder=' ...')} ({exit_text(code)})"
    return f"{'ended without a reason' if status else 'the command ended before the run began'}, {exit_text(code)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
