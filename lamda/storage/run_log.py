"""RUN/train.log: console output and warnings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from lamda.best_effort import BestEffort
from lamda.console import SHOWN
from lamda.data import quarantine

LOGGERS = ("lamda", "DeepSpeed", "py.warnings")


@contextmanager
def run_log(path: Path, *, is_main: bool) -> Iterator[None]:
    """Inside this context, warnings go to the console and to `path`, and console output also to `path`.

    is_main: only rank 0 writes `path` and warns of bad lines; it gathers those of other ranks at each save.
    """
    handlers: list[logging.Handler] = [_console_handler()]
    if is_main:
        with BestEffort(f"{path} cannot be written"):
            handlers.append(_file_handler(path))
    bad_lines = each_bad_line_once() if is_main else _bad_lines_through(lambda record: False)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = list(handlers)
        logger.propagate = False  # libraries, JAX's among them, put handlers of their own at the root
        logger.setLevel(logging.INFO if logger.name == "lamda" else logging.WARNING)
    logging.captureWarnings(True)  # noqa: FBT003 - the name is the library's
    try:
        with bad_lines:
            yield
    finally:
        logging.captureWarnings(False)  # noqa: FBT003
        for logger, handlers_before, level, propagate in before:
            logger.handlers, logger.propagate = handlers_before, propagate
            logger.setLevel(level)
        with BestEffort(f"{path} is incomplete", then="the run is not affected"):
            for handler in handlers:
                handler.close()


def each_bad_line_once() -> AbstractContextManager[None]:
    """Inside this context, each bad line causes one warning: training a tokenizer and rollbacks read it again."""
    known: dict[str, logging.LogRecord] = {}
    # In one step: threads read side by side.
    return _bad_lines_through(lambda record: known.setdefault(record.getMessage(), record) is record)


@contextmanager
def _bad_lines_through(only: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    bad_lines = logging.getLogger(quarantine.__name__)
    bad_lines.addFilter(only)
    try:
        yield
    finally:
        bad_lines.removeFilter(only)


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign] # the disk is full: the console has said it
    return handler


def _console_handler() -> logging.Handler:
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: record.name != SHOWN)
    return handler


class _StandardError(logging.StreamHandler[TextIO]):
    """The current standard error: a progress bar replaces it to print above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: object) -> None:
        pass
