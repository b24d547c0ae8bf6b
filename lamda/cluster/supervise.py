"""`lamda supervise`: start a run, and start it again whenever it fails."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lamda import console
from lamda.cluster.outcome import MISTAKE_EXIT, RESTARTS, Outcome, outcome, saved_step, signal_name, status_of
from lamda.cluster.processes import POLL_SECONDS, Launch
from lamda.config.errors import UserError
from lamda.config.loading import DEPRECATED, KEYS, load_config
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import STOP_EXIT, heeded_signals

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
ORPHAN_SECONDS = 30.0
"""How long ranks whose launcher has died may take to save and leave, as they do by themselves."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda supervise`, without the command behind --."""
    parser = argparse.ArgumentParser(
        prog="lamda supervise", allow_abbrev=False, usage="%(prog)s [--run DIR] -- COMMAND ..."
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="directory of the run; default: the command's run.dir")
    return parser


def main(argv: list[str]) -> int:
    """`[--run DIR] -- COMMAND ...`; 0 finished, 75 stopped and can go on, 1 given up, 2 a user's mistake.

    Raises UserError.
    """
    run, command = _parse(argv)
    console.outlive()
    return supervise(command, RunDirectory(run))


def supervise(command: Sequence[str], directory: RunDirectory) -> int:
    """Run a command that trains, as `main`."""
    with noted(heeded_signals()) as signals:
        return Supervisor(command, directory, signals).supervise()


class Supervisor:
    """Runs `command` until the run in `directory` is finished, stopped, or beyond help.

    signals: those that came for this process; whoever notes them appends. pause: seconds before the first
    restart, twice as many before each further one. patience: seconds that ranks without a launcher have.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: RunDirectory,
        signals: Sequence[int],
        *,
        pause: float = FIRST_PAUSE,
        patience: float = ORPHAN_SECONDS,
    ) -> None:
        self._command, self._directory, self._signals = command, directory, signals
        self._pause, self._patience = pause, patience
        self._passed_on = 0

    def supervise(self) -> int:
        """Start, and restart; returns the exit code."""
        restarts = fruitless = 0
        saved = saved_step(self._directory)
        while True:
            before = status_of(self._directory)
            code = self._run()
            ended = outcome(code, before=before, after=status_of(self._directory))
            if (verdict := self._verdict(ended)) is not None:
                return verdict
            now = saved_step(self._directory)
            if now > saved:
                saved, fruitless = now, 0
            if fruitless == RESTARTS:
                _say(self._farewell(saved, ended.reason), to=sys.stderr)
                return 1
            restarts, fruitless = restarts + 1, fruitless + 1
            pause = min(LONGEST_PAUSE, self._pause * 2 ** (restarts - 1))
            place = f"from step {now}" if now else "from the beginning"
            _say(f"restart {restarts} {place} in {pause:g} s: {ended.reason}")
            self._rest(pause)
            if self._signals:
                _say(f"{signal_name(self._signals[0])}: not started again")
                return STOP_EXIT

    def _run(self) -> int:
        """The command once, until nothing of it is left; its exit code."""
        launch = Launch(self._command, run=self._directory.path)
        _say(f"{self._directory.path}: {shlex.join(self._command)}")
        try:
            while launch.poll() is None:
                self._pass_on(launch)
                time.sleep(POLL_SECONDS)
            deadline = time.monotonic() + self._patience
            while launch.living() and (self._signals or time.monotonic() < deadline):
                self._pass_on(launch)
                time.sleep(POLL_SECONDS)
        finally:
            launch.kill()
            if self._signals:  # a stop that the run did not live to obey must not stop the next one
                self._directory.stop.unlink(missing_ok=True)
        return launch.poll()

    def _pass_on(self, launch: Launch) -> None:
        """Ask the run to stop once for each signal; a second Ctrl-C ends it."""
        for number in self._signals[self._passed_on :]:
            self._passed_on += 1
            if number == signal.SIGINT and self._signals[: self._passed_on].count(number) > 1:
                _say("Ctrl-C again: the run is killed")
                launch.kill()
                return
            _say(f"{signal_name(number)}: the run is asked to save and to leave; Ctrl-C twice kills it")
            with suppress(OSError):  # there is no run yet, or no disk: the signal is left
                self._directory.stop.touch()
            launch.ask(number)

    def _verdict(self, ended: Outcome) -> int | None:
        """The exit code to leave with, or None where the run should be started again."""
        if ended.kind == "finished":
            _say(f"finished, {status_of(self._directory).get('step')} steps")
            return 0
        if ended.kind == "mistake":
            _say(f"not started again, for it would be refused again: {ended.reason}", to=sys.stderr)
            return MISTAKE_EXIT
        if not self._signals and ended.kind != "stopped":
            return None
        saved = saved_step(self._directory)
        _say(f"stopped: {ended.reason}; the newest checkpoint is of step {saved}, the same command goes on")
        return STOP_EXIT

    def _rest(self, seconds: float) -> None:
        """Wait, also for a rank 0 on another machine, whose lock would refuse the next start."""
        deadline = time.monotonic() + seconds
        if host := self._directory.writer_elsewhere():
            _say(f"waiting for rank 0 on {host} to end")
        while not self._signals and (time.monotonic() < deadline or self._directory.writer_elsewhere()):
            time.sleep(POLL_SECONDS)

    def _farewell(self, step: int, reason: str) -> str:
        path = self._directory.path
        return (
            f"given up: {RESTARTS} restarts in a row brought no checkpoint newer than step {step}. The last failure: "
            f"{reason}. See {self._directory.log}, and {path / 'hang'} for stacks where the run hung"
        )


def _parse(argv: list[str]) -> tuple[Path, list[str]]:
    """The run directory and the command."""
    own = argv.index("--") if "--" in argv else len(argv)
    options, command = parser().parse_args(argv[:own]), argv[own + 1 :]
    if not command:
        raise UserError("lamda supervise: there is no command; write it behind --, lamda supervise -- COMMAND ...")
    return options.run or _run_of(command), command


def _run_of(command: list[str]) -> Path:
    """`run.dir` of a command that ends with the run's own flags, whatever launcher stands before them."""
    own = {"--config", *(f"--{key}" for key in (*KEYS, *DEPRECATED))}
    first = next((place for place, word in enumerate(command) if word.partition("=")[0] in own), None)
    if first is None:
        raise UserError(
            "lamda supervise: the command has no --config, so that its run directory is not known; write lamda "
            "supervise --run DIR -- COMMAND ..."
        )
    return Path(load_config(command[first:]).run.dir)


@contextmanager
def noted(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Signals, noted as they come instead of what they would do."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str, *, to: Any = None) -> None:
    print(f"supervise: {text}", file=to or sys.stdout, flush=True)
