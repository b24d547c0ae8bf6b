"""`lamda supervise`: start a run, and restart it when it fails."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamda import console
from lamda.cluster.processes import POLL_SECONDS, Launch
from lamda.cluster.restarts import MAX_RESTARTS, USER_ERROR_EXIT, Outcome, outcome, saved_step, signal_name
from lamda.config.errors import UserError
from lamda.config.loading import DEPRECATED, KEYS, load_config
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import STOP_EXIT, handling_signals

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
ORPHAN_SECONDS = 30.0
"""Time for ranks whose launcher has died to save and exit by themselves."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda supervise`, without the command behind --."""
    parser = argparse.ArgumentParser(
        prog="lamda supervise", allow_abbrev=False, usage="%(prog)s [--run DIR] -- COMMAND ..."
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="directory of the run; default: the command's run.dir")
    return parser


def main(argv: list[str]) -> int:
    """`[--run DIR] -- COMMAND ...`; 0 finished, 75 stopped and can resume, 1 gave up, 2 a user's mistake."""
    run, command = _parse(argv)
    console.outlive()
    return supervise(command, RunDirectory(run))


def supervise(command: Sequence[str], directory: RunDirectory) -> int:
    """Supervise a training command, as `main` does."""
    signals: list[int] = []
    with handling_signals(lambda number, _: signals.append(number)):
        return Supervisor(command, directory, signals).supervise()


@dataclass
class Supervisor:
    """Runs `command` until the run in `directory` finishes, stops, or fails too often.

    signals: received by this process so far. pause: seconds before the first restart, doubled for each further
    one. orphan_seconds: time for ranks without a launcher to exit.
    """

    command: Sequence[str]
    directory: RunDirectory
    signals: Sequence[int]
    pause: float = FIRST_PAUSE
    orphan_seconds: float = ORPHAN_SECONDS
    _passed_on: int = 0

    def supervise(self) -> int:
        """Start and restart the run; returns the exit code."""
        restarts = fruitless = 0
        saved = saved_step(self.directory)
        while True:
            before = self.directory.read_status()
            code = self._run()
            ended = outcome(code, before=before, after=self.directory.read_status())
            if (verdict := self._verdict(ended)) is not None:
                return verdict
            now = saved_step(self.directory)
            if now > saved:
                saved, fruitless = now, 0
            if fruitless == MAX_RESTARTS:
                _say(
                    f"gave up: {MAX_RESTARTS} restarts in a row without a checkpoint newer than step {saved}. Last "
                    f"failure: {ended.reason}. See {self.directory.log}, and {self.directory.path}/hang for stack "
                    "traces if the run hung",
                    to=sys.stderr,
                )
                return 1
            restarts, fruitless = restarts + 1, fruitless + 1
            pause = min(LONGEST_PAUSE, self.pause * 2 ** (restarts - 1))
            place = f"from step {now}" if now else "from the beginning"
            _say(f"restart {restarts} {place} in {pause:g} s: {ended.reason}")
            self._wait(pause)
            if self.signals:
                _say(f"{signal_name(self.signals[0])}: not restarted")
                return STOP_EXIT

    def _run(self) -> int:
        """Run the command once, until all of its processes have ended; returns its exit code."""
        launch = Launch(self.command, run=self.directory.path)
        _say(f"{self.directory.path}: {shlex.join(self.command)}")
        try:
            while launch.poll() is None:
                self._pass_on(launch)
                time.sleep(POLL_SECONDS)
            deadline = time.monotonic() + self.orphan_seconds
            while launch.living() and (self.signals or time.monotonic() < deadline):
                self._pass_on(launch)
                time.sleep(POLL_SECONDS)
        finally:
            launch.kill()
            if self.signals:  # a stop request that the run did not live to handle must not stop the next one
                self.directory.stop.unlink(missing_ok=True)
        return launch.exit_code()

    def _pass_on(self, launch: Launch) -> None:
        """Ask the run to stop once per signal; a second Ctrl-C kills it."""
        for number in self.signals[self._passed_on :]:
            self._passed_on += 1
            if number == signal.SIGINT and self.signals[: self._passed_on].count(number) > 1:
                _say("Ctrl-C again: killing the run")
                launch.kill()
                return
            _say(f"{signal_name(number)}: asked the run to save and exit; Ctrl-C twice kills it")
            with suppress(OSError):  # no run directory yet, or no disk: the signal still reaches the run
                self.directory.stop.touch()
            launch.forward(number)

    def _verdict(self, ended: Outcome) -> int | None:
        """The exit code, or None if the run should be restarted."""
        if ended.kind == "finished":
            _say(f"finished, {self.directory.read_status().get('step')} steps")
            return 0
        if ended.kind == "mistake":
            _say(f"not restarted, it would fail again: {ended.reason}", to=sys.stderr)
            return USER_ERROR_EXIT
        if not self.signals and ended.kind != "stopped":
            return None
        saved = saved_step(self.directory)
        _say(f"stopped: {ended.reason}; the newest checkpoint is of step {saved}; the same command resumes")
        return STOP_EXIT

    def _wait(self, seconds: float) -> None:
        """Wait, also for rank 0 on another machine, whose lock would block the next start."""
        deadline = time.monotonic() + seconds
        if host := self.directory.writer_elsewhere():
            _say(f"waiting for rank 0 on {host} to end")
        while not self.signals and (time.monotonic() < deadline or self.directory.writer_elsewhere()):
            time.sleep(POLL_SECONDS)


def _parse(argv: list[str]) -> tuple[Path, list[str]]:
    """The run directory and the command."""
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = parser().parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        raise UserError("lamda supervise: no command; write it after --: lamda supervise -- COMMAND ...")
    return options.run or _run_dir_of(command), command


def _run_dir_of(command: list[str]) -> Path:
    """`run.dir` of a command that ends with the flags of a run, after any launcher."""
    flags = {"--config", *(f"--{key}" for key in (*KEYS, *DEPRECATED))}
    first = next((place for place, word in enumerate(command) if word.partition("=")[0] in flags), None)
    if first is None:
        raise UserError(
            "lamda supervise: the command has no --config, so its run directory is unknown; write lamda "
            "supervise --run DIR -- COMMAND ..."
        )
    return Path(load_config(command[first:]).run.dir)


def _say(text: str, *, to: Any = None) -> None:
    print(f"supervise: {text}", file=to or sys.stdout, flush=True)
