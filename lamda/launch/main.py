"""The common part of the training commands: configuration in, exit code out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lamda import console
from lamda.config.errors import DataUnavailableError, RunError, UserError, refused_by_system
from lamda.config.help import help_text
from lamda.config.loading import load_config, wants_help
from lamda.distributed import FailedElsewhereError, ReportedElsewhereError
from lamda.storage.reading import UnreadableError
from lamda.training.stop_requests import Signals

if TYPE_CHECKING:
    from lamda.engines.protocol import Framework
    from lamda.training.task import OpenBenchmarks, Task


def launch(
    argv: Sequence[str] | None, task: Callable[[], Task], framework: Framework, open_benchmarks: OpenBenchmarks
) -> int:
    """Train for a task with a framework; returns the exit code.

    task: makes the task, after torch may be imported. open_benchmarks: loads the tasks of `eval.tasks`.

    0 finished, 75 stopped on request with everything saved (`RUN/status.json` has the same), 1 failed, 2 a mistake of
    the user, 76 hung (`lamda.training.watchdog`), 130 interrupted immediately. A signal before the first step changes
    nothing and ends the process with 75.
    """
    console.outlive()  # before a library takes the streams
    with Signals() as signals:
        try:
            return _run(sys.argv[1:] if argv is None else argv, task, framework, open_benchmarks, signals)
        except (UserError, RunError) as error:
            if not isinstance(error, ReportedElsewhereError | FailedElsewhereError):
                print(error, file=sys.stderr, flush=True)
            return 2 if isinstance(error, UserError) else 1
        except OSError as error:
            if (message := refused_by_system(error)) is None:
                raise
            print(message, file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            return 130


def _run(
    arguments: Sequence[str],
    task: Callable[[], Task],
    framework: Framework,
    open_benchmarks: OpenBenchmarks,
    signals: Signals,
) -> int:
    """Train, or print the help. Other ranks than rank 0 raise its errors as ReportedElsewhere and FailedElsewhere."""
    world = framework.world()
    if world.is_main_process:
        signals.exit_on_signal(report=lambda name: print(f"{name}: nothing has begun", file=sys.stderr, flush=True))
    else:
        logging.getLogger("lamda.config").setLevel(logging.ERROR)  # rank 0 reports deprecated keys
    if wants_help(arguments):
        print(help_text())
        return 0
    try:
        config = load_config(arguments)
        framework.check(config, world)
    except UserError as error:
        if world.is_main_process:
            raise
        raise ReportedElsewhereError(str(error)) from error
    from lamda.training.setup import TrainingJob

    try:
        return TrainingJob(config, world, task(), framework, open_benchmarks, signals).run()
    except RunError as error:
        if world.is_main_process or isinstance(error, DataUnavailableError | UnreadableError):
            raise  # perhaps only this rank cannot read something
        raise FailedElsewhereError(str(error)) from error
