"""The measurement of tool use: what counts as a call, a right call and an answer that uses it."""

from __future__ import annotations

import json
import math

import pytest

from lamda.cli import main
from lamda.config.errors import UserError
from lamda.dialog.conversation import Conversation, Message, to_line
from lamda.dialog.ranking import Scored
from lamda.dialog.research import ToolCall, sources
from lamda.dialog.speaker import Reply
from lamda.dialog.tool_use import Outcome, Turn, chosen_turns, outcomes, summary, table, turns_of, wilson
from lamda.dialog.tools.calculator import Calculator
from lamda.dialog.tools.result import Result
from lamda.dialog.tools.toolset import Toolset
from tests.random_run import write_run


class Library:
    """A tool with one passage, which is second for its title."""

    name = "library"
    passage = Result("Giraffes sleep for half an hour a day", "animals:1")

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        return [[Result("Zebras do not", "animals:2")], [self.passage], []][min(again, 2)] if query == "sleep" else []


class Scripted:
    """A speaker that calls the tools with these queries and answers with this text."""

    def __init__(self, base: str, queries: list[str], answer: str) -> None:
        self.base, self.queries, self.answer = base, queries, answer

    def reply(self, messages):
        calls = [(query, self.queries[:place].count(query)) for place, query in enumerate(self.queries)]
        steps = tuple(ToolCall("TS", query, tuple(TOOLS(query, again=again))) for query, again in calls)
        candidate = Scored(self.base, {}, 0.0, rank=1)
        return Reply(self.answer, (candidate,), (*steps, ToolCall("user", self.answer)), sources(steps))


TOOLS = Toolset((Calculator(), Library()))
ASKED = (Message("user", "?"),)
SUM = Turn(ASKED, ("12+30",), Message("assistant", "It is 42."))
SLEEP = Turn(ASKED, ("sleep", "sleep"), Message("assistant", "Half an hour.", knowledge=("animals:1",)))
TALK = Turn(ASKED, (), Message("assistant", "Hello!"))


@pytest.mark.parametrize(
    ("turn", "base", "queries", "answer", "expected"),
    [
        (SUM, "About 40.", ["12+30"], "It is 42.", Outcome("result", called=True, found=True, used=True)),
        (SUM, "About 40.", ["30+12"], "42", Outcome("result", called=True, found=True, used=True)),
        (SUM, "About 40.", ["12+31"], "It is 43.", Outcome("result", called=True)),
        (SUM, "About 40.", ["12+30"], "It is 421, -42 or 42.5.", Outcome("result", called=True, found=True)),
        (SUM, "It is 42.", [], "It is 42.", Outcome("result", called=False, unaided=True)),
        (SLEEP, "?", ["sleep"], "for half an hour a day", Outcome("passage", called=True)),
        (
            SLEEP,
            "?",
            ["sleep"] * 2,
            "They do for half an hour a",
            Outcome("passage", called=True, found=True, used=True),
        ),
        (SLEEP, "?", ["sleep"] * 2, "half an hour a night", Outcome("passage", called=True, found=True)),
        (TALK, "Hello!", [], "Hello!", Outcome("no call", called=False)),
        (TALK, "Hello!", ["sleep"], "Hello!", Outcome("no call", called=True)),
    ],
)
def test_a_call_is_right_by_what_it_finds_and_used_by_what_is_said(turn, base, queries, answer, expected):
    assert [*outcomes(Scripted(base, queries, answer), TOOLS, [turn])] == [expected]


def test_a_reference_that_the_tools_do_not_find_is_an_error():
    with pytest.raises(UserError, match="do not find animals:1 for 'sleep'"):
        list(outcomes(Scripted("", [], ""), Toolset((Calculator(),)), [SLEEP]))


def test_turns_are_answers_to_a_user_with_the_calls_before_them():
    call, found = Message("assistant", "12+30", to="TS"), Message("tool", "42")
    bad = Message("assistant", "no", labels={"sensible": False})
    messages = [*ASKED, TALK.answer, *ASKED, Message("assistant", "40"), call, found, SUM.answer, *ASKED, bad]
    talk, looked_up = turns_of(Conversation(tuple(messages)))
    assert talk == TALK
    assert (looked_up.calls, looked_up.answer) == (SUM.calls, SUM.answer)
    assert looked_up.context == (*ASKED, TALK.answer, *ASKED)
    conversations = [Conversation(tuple(messages))] * 3
    assert [turn.kind for turn in chosen_turns(conversations, 2)] == ["result", "result", "no call", "no call"]
    assert len(chosen_turns(conversations, None)) == 6


@pytest.mark.parametrize(("count", "total"), [(0, 9), (1, 9), (50, 80), (9, 9)])
def test_an_interval_ends_where_the_score_test_rejects(count, total):
    for bound in wilson(count, total):
        if 0 < bound < 1:
            distance = abs(count / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert distance == pytest.approx(1.959964, abs=1e-5)
    assert wilson(0, 9)[0] == 0
    assert wilson(9, 9)[1] == 1


def test_shares_are_of_the_turns_of_a_kind():
    report = summary([Outcome("result", True, True, False), Outcome("result", True), Outcome("no call", False)])
    assert {name: part["share"] for name, part in report["result"].items() if name != "turns"} == {
        "called": 1, "found": 0.5, "used": 0, "unaided": 0,
    }  # fmt: skip
    assert report["no call"]["called"]["share"] == 0
    assert [line.split()[:2] for line in table(report)][1:] == [["result", "2"], ["no", "call"]]
    assert list(table({})) == []


def test_evaluate_measures_the_tools_of_a_checkpoint(tmp_path, tokenizer_path, capsys):
    run = write_run(tmp_path / "run", tokenizer_path, packing="whole")
    call, found = Message("assistant", "1+2", to="TS"), Message("tool", "3")
    asked = Conversation((Message("user", "the of"), Message("assistant", "2"), call, found, Message("assistant", "3")))
    talk = Conversation((Message("user", "and"), Message("assistant", "to in")))
    (tmp_path / "held-out.jsonl").write_bytes(to_line(asked) + to_line(talk))
    words = ["dialog", "evaluate", str(run), "--files", str(tmp_path / "held-out.jsonl"), "--tools", "calculator"]
    assert main([*words, "--json"]) == 0
    tools = json.loads(capsys.readouterr().out)["tools"]
    assert {kind: part["turns"] for kind, part in tools.items()} == {"result": 1, "no call": 1}
    assert 0 <= tools["result"]["called"]["interval"][0] <= tools["result"]["called"]["share"]
