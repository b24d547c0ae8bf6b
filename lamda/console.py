"""Standard output and standard error: whatever happens to them, it is no accident of the work that writes there.

A terminal closes, the reader of a pipe leaves or sleeps, the disk of a log file is full, an encoding lacks a character.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SHOWN = "lamda.console"
"""Logger of what the console shows. Its records are for a log file, which keeps what the console loses."""
PATIENCE_SECONDS = 10.0
"""How long a console that takes no text, as a paused terminal does, may keep the work waiting."""

_KEPT = {"\n", "\t", "\u200c", "\u200d"}
"""Lines, tabs, and the joiners that emoji and Persian need."""
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that are not drawn but obeyed: escapes, direction overrides, separators."""

log = logging.getLogger(SHOWN)


def visible(text: str) -> str:
    """The text with every character that a terminal would obey written out: ESC becomes \\x1b."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in _KEPT and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """The text as `visible` shows it, line breaks and tabs written out as well."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def end_with_output() -> None:
    """Prepare a command whose work is its output: where that fails it ends, and `output_problem` has the reason.

    Characters that the encoding lacks are replaced; standard error raises nothing.
    """
    sys.stdout = _console(sys.stdout, "standard output", outlives=False)
    sys.stderr = _console(sys.stderr, "standard error", outlives=True)


def outlive() -> None:
    """Prepare a process that has more to do than to write: it outlives its console.

    Text that standard output or standard error does not take is lost, which the log says.
    """
    sys.stdout = _console(sys.stdout, "standard output", outlives=True)
    sys.stderr = _console(sys.stderr, "standard error", outlives=True)


def output_problem() -> OSError | None:
    """Why standard output could not be written, if so; from then on what is written there is dropped."""
    file = _file_of(sys.stdout)
    return file.problem if isinstance(file, _ConsoleFile) else None


def _console(stream: TextIO | None, name: str, *, outlives: bool) -> TextIO:
    """The stream on a file of our own; a stream of another kind, a test's perhaps, as it is."""
    if stream is None:  # closed before the process began
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - it stays open
    file = _file_of(stream)
    if type(stream) is not io.TextIOWrapper or not isinstance(file, io.FileIO):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_ConsoleFile(file.fileno(), name=name, outlives=outlives)),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "backslashreplace" else "replace",
        line_buffering=True,
    )


def _file_of(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # there is no buffer in between where PYTHONUNBUFFERED is set


class _ConsoleFile(io.FileIO):
    """A console's file. One that is outlived drops what it cannot write; any other raises OSError once."""

    def __init__(self, descriptor: int, *, name: str, outlives: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.problem: OSError | None = None
        self._name, self._outlives = name, outlives
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, data: ReadableBuffer) -> int:
        """Write all of the data, or drop it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError as error:
            is_new, self.problem = self.problem is None, error
            if not self._outlives:
                self._outlives = True
                raise
            if is_new:
                self._warn(error)
        else:
            self.problem = None
        return size

    def _write_some(self, data: memoryview) -> int:
        """Write the beginning. Raises OSError, TimeoutError where an outlived console does not take it in time."""
        seconds = PATIENCE_SECONDS if self.problem is None else 0.0
        if self._outlives and not self._poll.poll(1000 * seconds):
            raise TimeoutError(f"it has taken no text for {PATIENCE_SECONDS:g} s")
        return os.write(self.fileno(), data[: select.PIPE_BUF])  # so much never blocks where `poll` says so

    def _warn(self, error: OSError) -> None:
        # Not `BestEffort`: its warning would go to the console too, in the middle of this write.
        if log.hasHandlers():
            log.warning("%s is lost (%s); this log has what it would show", self._name, error.strerror or error)
