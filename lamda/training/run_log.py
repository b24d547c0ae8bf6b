"""RUN/train.log: what the console shows, and everything that warns."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.console import SHOWN

LOGGERS = ("lamda", "DeepSpeed", "py.warnings")


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """While this is entered, warnings go to the console and to `path`, what the console shows to `path`, too."""
    handlers: list[logging.Handler] = [_console_handler()]
    with BestEffort(f"{path} cannot be written"):
        handlers.append(_file_handler(path))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO if logger.name == "lamda" else logging.WARNING)
    logging.captureWarnings(True)  # noqa: FBT003 - the name is the library's
    try:
        yield
    finally:
        logging.captureWarnings(False)  # noqa: FBT003
        for logger, own, level in before:
            logger.handlers = own
            logger.setLevel(level)
        for handler in handlers:
            handler.close()


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


class _StandardError(logging.StreamHandler):
    """Standard error as it is when a record comes: a bar puts what is written there above itself."""

    @property
    def stream(self):  # noqa: ANN202
        return sys.stderr

    @stream.setter
    def stream(self, stream: object) -> None:
        pass
