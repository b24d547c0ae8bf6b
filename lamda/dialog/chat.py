"""`lamda chat`: talk to a model in the terminal, or line by line through a pipe.

Text of the model and of files is escaped, so that it cannot control the terminal.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lamda.config.errors import UserError
from lamda.console import one_line, visible
from lamda.dialog.conversation import Conversation, Message, to_line
from lamda.dialog.options import add_options, calibrated, reply_options_of, toolset_of, usable_tools
from lamda.durable import append_line
from lamda.inference.command import add_sampling_options

if TYPE_CHECKING:
    from lamda.dialog.ranking import Scored
    from lamda.dialog.research import ToolCall
    from lamda.dialog.speaker import Reply, Speaker

HELP = """\
/why          how the last reply was chosen: candidates, scores, dropped ones, research and sources
/reset        start a new conversation
/save FILE    append the conversation to a file, as one JSON line
/help         show this help
/quit         quit (so does Ctrl-D)"""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda chat`."""
    parser = argparse.ArgumentParser(prog="lamda chat", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, a checkpoint or an imported model")
    parser.add_argument("--system", metavar="TEXT", help="a system message that begins the conversation")
    add_options(parser)
    add_sampling_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """As `lamda chat --help` says; raises UserError."""
    options = parser().parse_args(argv)
    if sys.stdin is None:
        raise UserError("lamda chat: standard input is closed; it reads what you say from there")
    reply_options, toolset = reply_options_of(options), toolset_of(options)
    from lamda.dialog.speaker import Speaker
    from lamda.inference.loading import load_run

    loaded = load_run(options.run, int8=options.int8)
    reply_options = calibrated(reply_options, loaded, threshold=options.threshold)
    toolset = usable_tools(toolset, loaded.path, forced=options.force_tools)
    speaker = Speaker.of(loaded, toolset=toolset, options=reply_options)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    system = options.system and options.system.encode(errors="replace").decode()
    chat = Chat(speaker, system=system, shown=visible if is_terminal else one_line)
    if is_terminal:
        candidates = f"{reply_options.candidates} candidates per reply"
        mode = candidates if speaker.is_tuned else "pre-trained only, it continues lines"
        tools = ", ".join(tool.name for tool in toolset.tools) if toolset else "no tools"
        print(visible(f"{options.run}, {loaded.path.name}: {mode}; {tools}; /help lists commands"))
        chat.run(_typed(), busy=lambda: Console(stderr=True).status("..."))
    else:
        chat.run(sys.stdin, busy=nullcontext)
    return 0


class Chat:
    """A conversation and its commands. messages: the context of the next reply. reply: the last one, for /why."""

    def __init__(self, speaker: Speaker, *, system: str | None = None, shown: Callable[[str], str] = visible) -> None:
        """shown: makes a reply's text safe to print."""
        self._speaker, self._shown = speaker, shown
        self._first = [Message("system", system)] if system else []
        self.messages = [*self._first]
        self.reply: Reply | None = None

    def run(self, lines: Iterable[str], *, busy: Callable[[], AbstractContextManager[object]]) -> None:
        """Answer lines until the end or /quit."""
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                self._answer(line.strip(), busy)
            except KeyboardInterrupt:
                print("\n(stopped; this turn was discarded)")

    def _answer(self, line: str, busy: Callable[[], AbstractContextManager[object]]) -> None:
        if line.startswith("/"):
            print(self._command(line), flush=True)
        elif line:
            messages = [*self.messages, Message("user", line)]
            written: list[str] = []

            def write(text: str) -> None:
                written.append(text)
                print(self._shown(text), end="", flush=True)

            with nullcontext() if self._speaker.streams() else busy():
                self.reply = self._speaker.reply(messages, on_text=write)
            if "".join(written).strip() != self.reply.text:  # it was not streamed, or is the refusal
                write(self.reply.text)
            print(flush=True)
            if note := self.reply.context.note():
                print(f"({note})", file=sys.stderr, flush=True)  # through a pipe, a reply is one line
            self.messages = [*messages, Message("assistant", self.reply.text, knowledge=self.reply.sources)]
            for source in self.reply.sources:
                print(visible(f"  [{source}]"), flush=True)

    def _command(self, line: str) -> str:
        name, _, argument = line.partition(" ")
        if name == "/why":
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            return "there is no reply yet" if self.reply is None else explanation(self.reply, width=width)
        if name == "/reset":
            self.messages, self.reply = [*self._first], None
            return "(new conversation)"
        if name == "/save":
            return "there is no reply yet" if self.messages == self._first else _save(self.messages, argument.strip())
        return HELP if name == "/help" else visible(f"there is no command {name}\n") + HELP


def explanation(reply: Reply, *, width: int | None = None) -> str:
    """The text of /why: candidates with scores and drop reasons, research steps and sources; wrapped to `width`."""
    entries = [entry for candidate in reply.candidates for entry in _candidate(candidate)]
    if reply.refused:
        entries.append(("", "every candidate was dropped: the reply is the configured refusal"))
    entries += [entry for step in reply.steps for entry in _step(step)]
    entries += [("source: ", source) for source in reply.sources]
    return "\n".join(_wrapped(prefix, visible(_line(text)), width) for prefix, text in entries)


def _candidate(candidate: Scored) -> list[tuple[str, str]]:
    place = "dropped" if candidate.rank is None else f"#{candidate.rank}"
    scores = " ".join(f"{name} {value:.3f}" for name, value in candidate.scores.items())
    reason = f" ({candidate.dropped})" if candidate.dropped else ""
    return [(f"{place:>8} {candidate.value:7.3f}  ", scores + reason), (" " * 18, candidate.text)]


def _step(step: ToolCall) -> list[tuple[str, str]]:
    if step.to == "user":
        dropped = f" (dropped: {step.dropped}; the base answer is the reply)" if step.dropped else ""
        return [("research: User, ", step.text + dropped)]
    found = [f"{result.text}{f' [{result.source}]' if result.source else ''}" for result in step.results]
    return [("research: TS, ", step.text), *((" " * 10, text) for text in found or ["(no results)"])]


def _wrapped(prefix: str, text: str, width: int | None) -> str:
    """The text after its prefix, further lines indented as far; in a narrow terminal, below it."""
    if width is None:
        return prefix + text
    indent = " " * len(prefix)
    if len(prefix) * 2 > width:
        indent = "  "
        prefix = f"{prefix.strip()}\n{indent}" if prefix.strip() else indent
    lines = Text(text).wrap(Console(), max(width - len(indent), 1), overflow="fold")
    return prefix + f"\n{indent}".join(line.plain.rstrip() for line in lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _save(messages: Sequence[Message], name: str) -> str:
    if not name:
        return "give a file: /save FILE"
    try:
        append_line(Path(name).expanduser(), to_line(Conversation(tuple(messages))).decode().rstrip("\n"))
    except (OSError, RuntimeError, ValueError) as error:  # also a home of nobody, and a name with a null character
        return visible(f"{name}: cannot be written ({getattr(error, 'strerror', None) or error})")
    return visible(f"{name}: added a conversation of {len(messages)} messages")


def _typed() -> Iterator[str]:
    """Typed lines, with a history in memory only."""
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/quit to quit)")
        except EOFError:
            print()
            return
