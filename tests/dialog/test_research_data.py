"""Conversations that teach the loop are ones that the tools really give."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path

import pytest

from lamda.cli import main
from lamda.config.errors import UserError
from lamda.dialog.conversation import Conversation, Message, parse_conversation, to_line
from lamda.dialog.examples import Response, examples_of
from lamda.dialog.tool_data import held_out_conversations, make_conversations
from lamda.dialog.tools.calculator import calculate
from lamda.dialog.tools.toolset import open_toolset

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The conversations, and what the command told a program of them."""
    path, output = tmp_path_factory.mktemp("data") / "loop.jsonl", io.StringIO()
    with redirect_stdout(output):
        assert main(["dialog", "research-data", str(DOCS), "-o", str(path), "--count", "60", "--json"]) == 0
    return [parse_conversation(json.loads(line)) for line in path.read_text().splitlines()], json.loads(
        output.getvalue()
    )


@pytest.fixture(scope="module")
def conversations(made):
    return made[0]


def test_a_program_is_reported_what_was_made(made, conversations):
    asking = [sum(message.to == "TS" for message in conversation.messages) for conversation in conversations]
    counts = {"conversations": 60, "queries": sum(asking), "without_queries": asking.count(0)}
    assert {name: made[1][name] for name in counts} == counts
    assert Path(made[1]["file"]).is_file()


def test_every_conversation_is_a_question_a_base_the_steps_and_a_response(conversations):
    assert len(conversations) == 60
    queries = []
    for conversation in conversations:
        (asked, base, *steps, last) = conversation.messages
        assert (asked.role, base.role, base.to, last.role, last.to) == (
            "user",
            "assistant",
            "user",
            "assistant",
            "user",
        )
        assert [(step.role, step.to) for step in steps] == [("assistant", "TS"), ("tool", "user")] * (len(steps) // 2)
        queries.append(len(steps) // 2)
    assert {0, 1} <= {*queries}
    assert max(queries) <= 4


def test_fine_tuning_learns_the_base_and_every_step(conversations):
    for conversation in conversations:
        queries = sum(message.to == "TS" for message in conversation.messages)
        (base, *steps), ratings = examples_of(conversation)
        assert isinstance(base, Response)
        assert [step.action.to for step in steps] == ["TS"] * queries + ["user"]
        assert ratings == []


def test_snippets_are_what_the_toolset_answers(conversations):
    toolset = open_toolset(["calculator", "retrieval"], corpus=DOCS)
    for conversation in conversations:
        steps = conversation.messages[2:-1]
        for again, (query, snippet) in enumerate(zip(steps[::2], steps[1::2], strict=True)):
            assert snippet.content == "\n".join(result.text for result in toolset(query.content, again=again))


def test_sums_are_right_and_quotations_stand_in_their_source(conversations):
    sums = lookups = 0
    for conversation in conversations:
        query, last = conversation.messages[2], conversation.messages[-1]
        if last.knowledge:
            path, line = last.knowledge[0].rsplit(":", 1)
            below = Path(path).read_text().split("\n")[int(line) - 1 :]
            assert last.content in " ".join(" ".join(below).split())
            lookups += 1
        elif query.to == "TS":
            assert last.content == f"It is {float(calculate(query.content)):g}." or Fraction(
                last.content.removeprefix("It is ").rstrip(".")
            ) == calculate(query.content)
            sums += 1
    assert sums > 20
    assert lookups > 20


def test_the_same_seed_makes_the_same_conversations():
    toolset = open_toolset(["calculator", "retrieval"], corpus=DOCS)
    one, same, other = ([*make_conversations(toolset, count=20, seed=seed)] for seed in (1, 1, 2))
    assert one == same != other


def test_held_out_questions_are_asked_once_and_never_taught():
    toolset = open_toolset(["calculator", "retrieval"], corpus=DOCS)
    taught, held_out = (
        [message.content for conversation in made for message in conversation.messages if message.to == "TS"]
        for made in (make_conversations(toolset, count=300, seed=0), held_out_conversations(toolset, count=40, seed=0))
    )
    held_out_calls = Counter(held_out)
    assert len(held_out_calls) == 40
    assert not held_out_calls.keys() & {*taught}
    assert sum(calculate(query) is not None for query in held_out_calls) >= 20


def test_turns_of_other_dialogues_are_answers_without_a_tool(tmp_path):
    talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    looked_up = [Message("assistant", "q", to="TS"), Message("tool", "r"), Message("assistant", "s")]
    (tmp_path / "talk.jsonl").write_bytes(to_line(Conversation((*talk, Message("user", "e"), *looked_up))))
    words = [str(DOCS), "-o", str(tmp_path / "out.jsonl.gz"), "--count", "50"]
    assert main(["dialog", "make-tool-data", *words, "--dialogues", str(tmp_path / "talk.jsonl")]) == 0
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()[8::10]
    found = {tuple((m.role, m.content) for m in parse_conversation(json.loads(line)).messages) for line in lines}
    pairs = (("a", "b"), ("c", "d"))
    assert found == {(("user", said), ("assistant", answer), ("assistant", answer)) for said, answer in pairs}


def test_a_corpus_with_nothing_to_ask_about_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("nothing here\n")
    toolset = open_toolset(["calculator", "retrieval"], corpus=tmp_path)
    with pytest.raises(UserError, match="no Markdown heading"):
        list(make_conversations(toolset, count=1, seed=0))


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["-o", "docs/b.jsonl"], "is a file that is read"),
        (["-o", "out.jsonl", "--held-out", "docs/b.jsonl"], "is a file that is read"),
        (["-o", "out.jsonl", "--held-out", "docs/../out.jsonl"], "is OUT"),
        (["-o", "out.md"], "name a file that ends in .jsonl"),
        (["-o", "out.jsonl", "--count", "0"], "at least 1"),
        (["-o", "out.jsonl", "--held-out", "new.jsonl", "--count", "9"], "at least 10"),
        (["-o", "out.jsonl", "--dialogues", "docs/a.md"], "records come from"),
        (["-o", "out.jsonl", "--dialogues", "talk.jsonl"], "talk.jsonl, line 2: not JSON"),
        (["-o", "talk.jsonl", "--dialogues", "talk.jsonl"], "is a file that is read"),
    ],
)
def test_a_file_of_the_corpus_is_never_written_over(tmp_path, monkeypatch, capsys, words, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Paris\n\nParis is the capital and largest city of France.\n")
    (tmp_path / "docs" / "b.jsonl").write_text('{"text": "Lyon is a large city of France, on two rivers."}\n')
    talk = to_line(Conversation((Message("user", "a"), Message("assistant", "b"))))
    (tmp_path / "talk.jsonl").write_bytes(talk + b"{\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert main(["dialog", "research-data", "docs", *words]) == 2
    assert output in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
