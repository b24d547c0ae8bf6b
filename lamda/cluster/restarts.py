"""What a cluster job's batch script asks before and after each start of its run.

`python -m lamda.cluster.restarts begin RUN STATE RESTARTS` before, `... end RUN STATE CODE [--warned]` after. STATE
is the job's own folder: the status before the start, each node's exit code, and how many restarts came to nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lamda import console
from lamda.cluster.outcome import MISTAKE_EXIT, RESTARTS, outcome, saved_step, status_of
from lamda.storage.lock import STALE_SECONDS
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import STOP_EXIT

REQUEUE_EXIT = 99
"""Exit code of `end` where the job should be started again."""
POLL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Arguments as above; the exit code that the job should have, REQUEUE_EXIT where it should start again."""
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
    """Note how the run stands, and wait for a start of this job that has not quite ended on another node."""
    deadline = time.monotonic() + STALE_SECONDS
    if restarts and (host := directory.writer_elsewhere()):
        _say(f"waiting until rank 0 on {host} has been silent for {STALE_SECONDS} s")
        while directory.writer_elsewhere() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for file in state.glob("exit-*"):
        file.unlink()
    (state / "before.json").write_text(json.dumps(status_of(directory)), "utf-8")


def end(directory: RunDirectory, state: Path, *, code: int, warned: bool) -> int:
    """What should become of the job, told in a line.

    code: of the job step; each node's own is in STATE/exit-*. warned: whether the scheduler had said that the time
    is up, and the batch script asked for the stop.
    """
    before = json.loads((state / "before.json").read_text("utf-8"))
    ended = outcome(_first_word(state, code), before=before, after=status_of(directory))
    saved = saved_step(directory)
    if ended.kind == "finished":
        _say("finished")
        return 0
    if ended.kind == "mistake":
        _say("not started again: it would refuse again; each node's log says why")
        return MISTAKE_EXIT
    if ended.kind == "stopped" and ended.by_file and not warned:
        _say(f"stopped by RUN/STOP at step {saved}; `lamda submit` goes on")
        return STOP_EXIT
    if ended.kind == "failed" and not _may_restart(state, saved):
        _say(f"given up: {RESTARTS} restarts in a row brought no checkpoint newer than step {saved}: {ended.reason}")
        return 1
    _say(f"{ended.kind}: {ended.reason}; to be started again from {f'step {saved}' if saved else 'the beginning'}")
    return REQUEUE_EXIT


def _first_word(state: Path, code: int) -> int:
    """The exit code that tells most.

    A node that a scheduler ends because another one failed has an exit code that says nothing.
    """
    codes = {int(file.read_text("utf-8")) for file in state.glob("exit-*")}
    return next((known for known in (MISTAKE_EXIT, STOP_EXIT) if known in codes), code)


def _may_restart(state: Path, saved: int) -> bool:
    """Count a failure; False where too many in a row brought no newer checkpoint."""
    file = state / "failures.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {"saved": saved, "fruitless": 0}
    fruitless = known["fruitless"] if saved <= known["saved"] else 0
    file.write_text(json.dumps({"saved": max(saved, known["saved"]), "fruitless": fruitless + 1}), "utf-8")
    return fruitless < RESTARTS


def _say(text: str) -> None:
    print(f"job: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
