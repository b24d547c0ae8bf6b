"""`lamda chat` as a process, through a pipe and through a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from rich.cells import cell_len

from lamda.cli import main
from lamda.console import visible
from lamda.dialog.chat import Chat, explanation
from lamda.dialog.conversation import parse_conversation
from lamda.dialog.encoding import Context
from lamda.dialog.options import usable_tools
from lamda.dialog.ranking import Scored
from lamda.dialog.research import ToolCall
from lamda.dialog.speaker import REFUSAL, Reply
from lamda.dialog.tools.result import Result
from lamda.dialog.tools.toolset import Toolset
from tests.random_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path):
    """A model of random weights, as one that was fine-tuned."""
    return write_run(tmp_path_factory.mktemp("run") / "run", tokenizer_path, packing="whole")


def command(run, *options):
    start = "import sys; from lamda.cli import main; sys.exit(main(sys.argv[1:]))"
    few = ["--candidates", "3", "--max-new-tokens", "6", "--threshold", "1"]
    return [sys.executable, "-c", start, "chat", str(run), *few, *options]


def piped(run, text, *options):
    done = subprocess.run(command(run, *options), input=text.encode(), capture_output=True, timeout=600)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_through_a_pipe_every_line_is_answered_and_commands_work(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    saved = tmp_path / "talk.jsonl"
    saved.write_text('{"cut')  # by a full disk, say
    lines = ["/why", "the of and", "/why", f"/save {saved}", "to in", f"/save {saved}", "/save", "/nonsense"]
    lines += ["/save ~nobody-of-this-name/a", "/save a\0b", "/reset", f"/save {saved}"]
    code, out, errors = piped(run, "\n".join([*lines, "/quit", "never read"]) + "\n", "--system", "be brief")
    assert (code, errors) == (0, "")
    assert out.startswith("there is no reply yet\n")
    assert out.endswith("(new conversation)\nthere is no reply yet\n")
    assert "give a file: /save FILE" in out
    assert out.count("cannot be written (") == 2
    assert out.count("sensible 0.") == 3
    assert "#1" in out
    assert "there is no command /nonsense" in out
    first, second = (parse_conversation(json.loads(line)) for line in saved.read_text().splitlines()[1:])
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]
    assert second.messages[: len(first.messages)] == first.messages
    assert [message.content for message in second.messages if message.role == "user"] == ["the of and", "to in"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before  # nothing is kept in the run


def test_through_a_pipe_a_reply_of_two_lines_is_one(run, monkeypatch, capsys):
    monkeypatch.setattr("lamda.dialog.speaker.Speaker.reply", lambda *_, **__: Reply("the\nof", ()))
    monkeypatch.setattr("sys.stdin", io.StringIO("and\n"))
    assert main(["chat", str(run), "--threshold", "1"]) == 0
    assert capsys.readouterr().out == "the\\nof\n"


@pytest.fixture
def chain(tmp_path, run):
    """A run that began from another one that began from a pre-trained one: their checkpoints, the last one first."""
    checkpoints = []
    for name, packing in (("pretrained", "concat"), ("first", "whole"), ("second", "whole")):
        checkpoint = tmp_path / name / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        weights = f", weights: '{checkpoints[0]}/model.safetensors'" if checkpoints else ""
        (checkpoint / "config.yaml").write_text(
            f"model: {{vocab_size: 400{weights}}}\ndata: {{packing: {packing}}}\ntrain: {{steps: 1}}\n"
        )
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "tokens/generative": 9}\n')
        checkpoints.insert(0, checkpoint)
    return checkpoints


def test_tools_are_left_out_where_no_run_of_the_chain_was_taught_to_use_them(chain, tmp_path, caplog):
    toolset = Toolset(())
    assert usable_tools(None, chain[0]) is None
    assert not caplog.text
    assert [usable_tools(toolset, checkpoint) for checkpoint in chain] == [None, None, None]
    assert [usable_tools(toolset, checkpoint, forced=True) for checkpoint in chain] == [toolset] * 3
    assert f"{chain[0]} was not trained to use tools; they are disabled" in caplog.text
    (tmp_path / "first" / "metrics.jsonl").write_text('{"step": 1, "tokens/research": 9}\n')
    assert usable_tools(toolset, chain[0]) is toolset
    (tmp_path / "first" / "metrics.jsonl").unlink()
    assert usable_tools(toolset, chain[0]) is toolset, "nobody knows"


def test_a_chat_without_taught_tools_says_so_and_answers(run, tmp_path):
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens/generative": 9}\n')
    try:
        code, out, errors = piped(run, "the of\n/why\n", "--tools", "calculator")
    finally:
        (run / "metrics.jsonl").unlink()
    assert code == 0
    assert "was not trained to use tools" in errors
    assert out
    assert "research:" not in out


def test_forced_tools_are_used_by_a_model_that_was_not_taught(run, tmp_path):
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens/generative": 9}\n')
    (tmp_path / "a.txt").write_text("a zebra is the of and")
    options = ["--tools", "calculator,retrieval", "--corpus", str(tmp_path / "a.txt"), "--max-queries", "1"]
    try:
        code, out, errors = piped(run, "the of\n/why\n", *options, "--force-tools")
    finally:
        (run / "metrics.jsonl").unlink()
    assert (code, errors) == (0, "")
    assert "research: User, " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tools", "retrieval"], "--corpus"),
        (["--tools", "oracle"], "there is no tool 'oracle'"),
        (["--candidates", "0"], "give at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", str(10**12)], "at most 1,000,000"),
        (["--refusal", "no\udcff"], "the refusal is not valid UTF-8"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(tmp_path, capsys, options, message):
    assert main(["chat", str(tmp_path), *options]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_in_a_terminal_it_prompts_and_leaves_with_the_end_of_input(run):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        command(run), stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "dumb"}
    )
    os.close(child)

    def until_prompt() -> bytes:
        """What comes up to the next prompt; what is typed before it would be lost as readline takes over."""
        seen, end = b"", time.monotonic() + 300
        while not seen.endswith(b"> "):
            assert time.monotonic() < end, seen
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 4096)
        return seen

    assert b"3 candidates per reply; no tools; /help lists commands" in until_prompt()
    os.write(parent, b"the of and\n")
    until_prompt()
    os.write(parent, b"/why\n")
    assert b"#1" in until_prompt()
    os.write(parent, b"\x04")
    assert process.wait(timeout=300) == 0
    os.close(parent)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\rb\x08\x7f\x9b2J", "a\\rb\\x08\\x7f\\x9b2J"),
        ("abc\u202edef", "abc\\u202edef"),
        ("one\ntwo\tthree é 👩‍🔬 \u4e2d", "one\ntwo\tthree é 👩‍🔬 \u4e2d"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert visible(text) == shown


def test_the_explanation_has_scores_reasons_steps_and_sources_and_no_escapes():
    candidates = (
        Scored("good", {"sensible": 0.9, "unsafe": 0.1}, 3.5, rank=1),
        Scored("\x1b[2Jbad", {"sensible": 0.8, "unsafe": 0.9}, 3.0, dropped="P(unsafe) 0.900 is above 0.5"),
    )
    steps = (ToolCall("TS", "1+1", (Result("2"), Result("two\x1b[0m", "a.txt:1"))), ToolCall("user", "It is 2."))
    text = explanation(Reply("It is 2.", candidates, steps, ("a.txt:1",)))
    for part in ("#1   3.500  sensible 0.900 unsafe 0.100", "dropped", "(P(unsafe) 0.900 is above 0.5)", "TS, 1+1"):
        assert part in text
    for part in ("two\\x1b[0m [a.txt:1]", "User, It is 2.", "source: a.txt:1"):
        assert part in text
    assert "\x1b" not in text
    refused = explanation(Reply(REFUSAL, candidates[1:], refused=True))
    assert "the reply is the configured refusal" in refused


@pytest.mark.parametrize("width", [30, 60, 100])
def test_the_explanation_fits_the_terminal(width):
    words = [f"word{number}" for number in range(30)]
    scores = dict.fromkeys(("sensible", "specific", "interesting", "unsafe", "log_likelihood"), 0.5)
    texts = (" ".join(words), "x" * 300, "\u4e2d\u6587" * 60, "\x1b" * 40)
    candidates = tuple(Scored(text, scores, 3.5, rank=rank) for rank, text in enumerate(texts, start=1))
    steps = (ToolCall("TS", " ".join(words), (Result(" ".join(words), "a.txt:1"),)),)
    text = explanation(Reply("", candidates, steps, ("https://example.org/" + "y" * 200,)), width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    joined = "".join(text.split())
    for part in (
        "".join(words),
        "x" * 300,
        "\u4e2d\u6587" * 60,
        "\\x1b" * 40,
        "y" * 200,
        "log_likelihood0.500",
        "[a.txt:1]",
    ):
        assert joined.count(part) >= 1, part
    assert "#4" in text


def test_a_closed_standard_input_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "runs/none"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_turns_that_no_longer_fit_are_counted_beside_the_reply(capsys):
    class Forgetful:
        def streams(self):
            return False

        def reply(self, messages, *, on_text):
            return Reply("fine", (), context=Context([], turns_left_out=len(messages)))

    Chat(Forgetful()).run(["the of", "and to"], busy=nullcontext)
    out, err = capsys.readouterr()
    assert out == "fine\nfine\n"
    assert [line.rpartition(" ")[2] for line in err.splitlines()] == ["1)", "3)"]
