"""`lamda dialog make-tool-data`: conversations that teach the research loop, from a corpus and from arithmetic.

Every snippet is the toolset's real result for the query, so that training matches use. Three kinds alternate: a sum
(calculator), a question about a heading or about a sentence such as `X is ...` of the corpus (retrieval; the query is
repeated until the right passage comes), and what needs no tool: a courtesy, or a turn of other conversations, whose
base answer is the response. The questions are templates: they teach the loop's form, not conversation.

A tenth of all questions, by a hash of the query, is kept apart: it measures what was learned.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lamda.config.errors import UserError
from lamda.dialog.conversation import Conversation, Message, to_line
from lamda.dialog.convert import check_target, read_conversations, write_lines
from lamda.dialog.research import MAX_QUERIES
from lamda.dialog.tool_use import turns_of
from lamda.dialog.tools.result import Result
from lamda.dialog.tools.retrieval import Passage, Retrieval, find_files
from lamda.dialog.tools.toolset import Toolset, open_toolset

_COURTESIES = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Good morning.", "Good morning! How can I help?"),
    ("Thank you very much.", "You are welcome."),
    ("How are you?", "I am a program, and I am running well. How are you?"),
    ("Goodbye!", "Goodbye!"),
    ("That is interesting.", "I am glad that you find it interesting."),
    ("Can you help me?", "Gladly. What is it about?"),
    ("I did not understand that.", "I am sorry. Which part shall I say in other words?"),
)
_HEADING = re.compile(r"^#{1,6} +(.{3,60}?)\s*#*$", re.MULTILINE)
_DEFINITION = re.compile(r"^((?:(?:The|An?) )?[A-Z][\w'-]*(?: [\w'-]+){0,3}?) (is|was|are|were) [^\n]{20,}")
_SENTENCE = re.compile(r"\A\S.{10,}?[.!?](?=\s|$)", re.DOTALL)
_MAX_ANSWER = 300
"""Characters of an answer."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog make-tool-data`."""
    parser = argparse.ArgumentParser(prog="lamda dialog make-tool-data", allow_abbrev=False)
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="a folder of texts or a JSON-lines file")
    parser.add_argument(
        "-o", dest="out", type=Path, required=True, metavar="OUT", help=".jsonl, .jsonl.zst or .jsonl.gz"
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="conversations; default %(default)s")
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE",
        help="also write N/10 conversations, on questions that are never in OUT",
    )  # fmt: skip
    parser.add_argument(
        "--dialogues", type=Path, nargs="+", default=[], metavar="FILE",
        help="conversations; some of their turns are examples of answers that need no tool",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what is drawn; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object a file")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda dialog make-tool-data --help` says; raises UserError."""
    options = parser().parse_args(argv)
    if options.count < 1:
        raise UserError(f"--count {options.count}: give a number of at least 1")
    if options.held_out is not None and options.count < 10:
        raise UserError(f"--count {options.count}: --held-out has a tenth of it, which is none; give at least 10")
    toolset = open_toolset(["calculator", "retrieval"], corpus=options.corpus)
    targets = [options.out] if options.held_out is None else [options.out, options.held_out]
    for target in targets:
        check_target(target, [*find_files(options.corpus), *options.dialogues])
    if len({target.resolve() for target in targets}) < len(targets):
        raise UserError(f"--held-out {options.held_out}: is OUT; name another file")
    dialogues = list(read_conversations(options.dialogues))
    made = {options.out: list(make_conversations(toolset, count=options.count, seed=options.seed, dialogues=dialogues))}
    if options.held_out is not None:
        made[options.held_out] = list(held_out_conversations(toolset, count=options.count // 10, seed=options.seed))
    for out, conversations in made.items():
        write_lines(out, list(map(to_line, conversations)))
        asking = [sum(message.to == "TS" for message in conversation.messages) for conversation in conversations]
        count, queries, without = len(asking), sum(asking), asking.count(0)
        report = {"file": str(out), "conversations": count, "queries": queries, "without_queries": without}
        message = f"{out}: {count} conversations, {queries} queries, {without} without one"
        print(json.dumps(report) if options.json else message)
    return 0


def make_conversations(
    toolset: Toolset, *, count: int, seed: int, dialogues: Sequence[Conversation] = ()
) -> Iterator[Conversation]:
    """`count` conversations on questions that are not held out, determined by the arguments.

    dialogues: some of their turns are examples that need no tool. Raises UserError if there is nothing to ask about.
    """
    draw = random.Random(seed)
    questions = _questions_of(toolset, held_out=False)
    if not questions:
        raise UserError(
            "the corpus has no Markdown heading and no sentence `X is ...` at a passage's beginning to ask about"
        )
    failures = made = 0
    while made < count:
        kind = made % 10
        conversation: Conversation | None
        if kind == 9:
            greeting, answer = draw.choice(_COURTESIES)
            conversation = _conversation(greeting, answer, [], answer, ())
        elif kind == 8 and dialogues:
            conversation = _turn(draw.choice(dialogues), draw)
        elif kind % 2:
            conversation = _sum(toolset, draw)
        else:
            conversation = _lookup(toolset, draw.choice(questions))
        failures += conversation is None
        if failures > 10 * count:
            raise UserError(
                "retrieval does not find the corpus's own passages by their headings, or the dialogues have no answer "
                "to a user; give others"
            )
        if conversation is not None and not _is_held_out(_first_query(conversation)):
            made += 1
            yield conversation


def held_out_conversations(toolset: Toolset, *, count: int, seed: int) -> Iterator[Conversation]:
    """At most `count` held-out questions, each once: up to half of them on the corpus, the others sums."""
    draw = random.Random(seed + 1)
    questions = _questions_of(toolset, held_out=True)
    draw.shuffle(questions)
    found = [lookup for lookup in (_lookup(toolset, question) for question in questions) if lookup is not None]
    made = {_first_query(lookup): lookup for lookup in found[: count // 2]}
    while len(made) < count:
        conversation = _sum(toolset, draw)
        if _is_held_out(query := _first_query(conversation)):
            made[query] = conversation
    yield from made.values()


def _is_held_out(query: str | None) -> bool:
    return query is not None and zlib.crc32(query.encode()) % 10 == 0


def _first_query(conversation: Conversation) -> str | None:
    return next((message.content for message in conversation.messages if message.to == "TS"), None)


def _turn(dialogue: Conversation, draw: random.Random) -> Conversation | None:
    """What the user says last before an answer without tools; the answer is both base answer and response."""
    turns = [turn for turn in turns_of(dialogue) if not turn.calls]
    if not turns:
        return None
    context, _, answer = draw.choice(turns)
    return _conversation(context[-1].content, answer.content, [], answer.content, ())


def _questions_of(toolset: Toolset, *, held_out: bool) -> list[tuple[str, str, Passage]]:
    """The questions on the toolset's corpus that are held out, or the others."""
    (retrieval,) = (tool for tool in toolset.tools if isinstance(tool, Retrieval))
    return [question for question in _questions(retrieval.passages) if _is_held_out(question[1]) == held_out]


def _questions(passages: Sequence[Passage]) -> Iterator[tuple[str, str, Passage]]:
    """Questions, each with its query and the passage that answers it."""
    for passage in passages:
        if ".md:" in passage.source and (heading := _HEADING.match(passage.text)):
            title = heading[1].replace("`", "")
            yield f"What do the documents say about {title}?", title, passage
        elif definition := _DEFINITION.match(passage.text):
            subject = definition[1]
            first = subject[0].lower() if " " in subject else subject[0]
            yield f"What {definition[2]} {first}{subject[1:]}?", subject, passage


def _lookup(toolset: Toolset, question: tuple[str, str, Passage]) -> Conversation | None:
    """A question that the passage answers, or None if the tools do not find it in `MAX_QUERIES` queries."""
    asked, query, passage = question
    body = _HEADING.sub("", passage.text).strip()
    sentence = _SENTENCE.search(body)
    if sentence is None or len(sentence[0]) > _MAX_ANSWER or sentence[0].startswith("```"):
        return None
    exchanges: list[tuple[str, list[Result]]] = []
    for again in range(MAX_QUERIES):
        exchanges.append((query, toolset(query, again=again)))
        if any(result.source == passage.source and result.text == passage.text for result in exchanges[-1][1]):
            answer = " ".join(sentence[0].split())
            return _conversation(asked, "I am not sure; let me look it up.", exchanges, answer, (passage.source,))
    return None


def _sum(toolset: Toolset, draw: random.Random) -> Conversation:
    """A sum, a guess near it, and the calculator's result."""
    sign, first, second = draw.choice("+-*"), draw.randint(2, 9999), draw.randint(2, 999)
    percentage = f"{draw.randint(1, 99)}% of {10 * first}"
    sums = f"{first} {sign} {second}", f"{first}{sign}{second}", percentage, f"({first} + {second}) * 3"
    expression = draw.choice(sums)
    exact = next(result.text for result in toolset(expression) if result.source is None)
    guess = f"I think it is about {round(float(exact) * draw.uniform(0.9, 1.1))}."
    question = draw.choice(("What is {}?", "How much is {}?", "Can you work out {}?", "{} = ?"))
    return _conversation(question.format(expression), guess, [(expression, toolset(expression))], f"It is {exact}.", ())


def _conversation(
    question: str, base: str, exchanges: Sequence[tuple[str, list[Result]]], answer: str, knowledge: tuple[str, ...]
) -> Conversation:
    messages = [Message("user", question), Message("assistant", base)]
    for query, results in exchanges:
        messages.append(Message("assistant", query, to="TS"))
        messages.append(Message("tool", "\n".join(result.text for result in results)))
    return Conversation((*messages, Message("assistant", answer, knowledge=knowledge)))
