"""`lamda chat`: talk with a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from rich.console import Console

from lamda.console import visible
from lamda.dialog.conversation import Conversation, Message, to_record
from lamda.dialog.options import add_options, add_sampling_options, manner_of, toolset_of, usable_tools
from lamda.dialog.terminal import Typewriter, explanation

if TYPE_CHECKING:
    from lamda.dialog.speaker import Reply, Speaker

HELP = """\
/why          how the last reply was chosen: candidates, scores, what was dropped, research and sources
/reset        begin anew
/save FILE    add the conversation to a file of conversations, a JSON line
/help         this
/quit         leave (so does Ctrl-D)"""


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
    manner, toolset = manner_of(options), toolset_of(options)
    from lamda.dialog.speaker import Speaker
    from lamda.inference.loading import load_run

    loaded = load_run(options.run, int8=options.int8)
    toolset = usable_tools(toolset, loaded.path)
    speaker = Speaker.of(loaded, toolset=toolset, manner=manner)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")
    chat = Chat(speaker, system=options.system and options.system.encode(errors="replace").decode())
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        judged = (
            f"{manner.candidates} candidates a reply" if speaker.is_tuned else "pre-trained only, it continues lines"
        )
        tools = ", ".join(tool.name for tool in toolset.tools) if toolset else "no tools"
        print(visible(f"{options.run}, {loaded.path.name}: {judged}; {tools}; /help lists commands"))
    chat.run(_typed() if is_terminal else _piped(), busy=_spinner if is_terminal else nullcontext)
    return 0


class Chat:
    """A conversation and its commands.

    Attributes:
        messages: what both have said, as the next reply's context.
        reply: the last one, which /why explains.
    """

    def __init__(self, speaker: Speaker, *, system: str | None = None) -> None:
        self._speaker = speaker
        self._first = [Message("system", system)] if system else []
        self.messages = [*self._first]
        self.reply: Reply | None = None

    def run(self, lines: Iterator[str], *, busy: Callable[[], AbstractContextManager[object]]) -> None:
        """Answer lines until they end or one says /quit."""
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                self._answer(line.strip(), busy)
            except KeyboardInterrupt:
                print("\n(stopped; nothing was kept of that turn)")

    def _answer(self, line: str, busy: Callable[[], AbstractContextManager[object]]) -> None:
        if line.startswith("/"):
            print(self._command(line), flush=True)
        elif line:
            said = [*self.messages, Message("user", line)]
            typewriter = Typewriter(sys.stdout)
            if self._speaker.streams():
                self.reply = self._speaker.reply(said, on_text=typewriter.write)
            else:
                with busy():
                    self.reply = self._speaker.reply(said)
                typewriter.write(self.reply.text)
            if typewriter.written.strip() != self.reply.text:  # nothing came: the refusal
                typewriter.write(self.reply.text)
            typewriter.end()
            self.messages = [*said, Message("assistant", self.reply.text, knowledge=self.reply.sources)]
            for source in self.reply.sources:
                print(visible(f"  [{source}]"), flush=True)

    def _command(self, line: str) -> str:
        name, _, argument = line.partition(" ")
        if name == "/why":
            return "nothing was said yet" if self.reply is None else explanation(self.reply)
        if name == "/reset":
            self.messages, self.reply = [*self._first], None
            return "(begun anew)"
        if name == "/save":
            return "nothing was said yet" if self.messages == self._first else _save(self.messages, argument.strip())
        return HELP if name == "/help" else visible(f"there is no command {name}\n") + HELP


def _save(messages: Sequence[Message], name: str) -> str:
    if not name:
        return "give a file: /save FILE"
    try:
        with Path(name).expanduser().open("ab") as file:
            file.write(orjson.dumps(to_record(Conversation(tuple(messages)))) + b"\n")
    except OSError as error:
        return visible(f"{name}: cannot be written ({error.strerror})")
    return visible(f"{name}: added a conversation of {len(messages)} messages")


def _typed() -> Iterator[str]:
    """Lines that are typed, with a history that ends with the chat and is written nowhere."""
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/quit leaves)")
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    yield from sys.stdin


def _spinner() -> AbstractContextManager[object]:
    return Console(stderr=True).status("...")
