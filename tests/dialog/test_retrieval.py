"""Retrieval: passages with their places, the ranking against BM25's formula, and the index that is kept."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.dialog.tools import retrieval
from lamda.dialog.tools.calculator import Calculator
from lamda.dialog.tools.retrieval import LENGTH, Retrieval, read_passages
from lamda.dialog.tools.toolset import Toolset, open_toolset

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_answers_with_file_and_line():
    tool = Retrieval.open(DOCS)
    found = [tool("which symbol ends a document of the tokenizer", again=number) for number in range(40)]
    assert all(found)
    for (result,) in found:
        path, line = result.source.rsplit(":", 1)
        assert Path(path).read_text().splitlines()[int(line) - 1].endswith(result.text.splitlines()[0])


def test_repeating_a_query_gives_the_next_ranked_passage_until_none_is_left(tmp_path):
    texts = ["apple apple apple", "apple pear", "apple pear plum cherry fig date", "melon"]
    (tmp_path / "fruit.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool = Retrieval.open(tmp_path)
    found = [tool("apple", again=number) for number in range(5)]
    assert [[result.text for result in results] for results in found] == [[texts[0]], [texts[1]], [texts[2]], [], []]
    assert tool("apple")[0].source == f"{tmp_path / 'fruit.jsonl'}:1"


def _bm25(query: list[str], documents: list[list[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25, straight from its formula."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            having = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_the_ranking_is_bm25s(tmp_path):
    texts = ["red red fox", "red dog barks loud", "blue fox runs", "green fox fox sleeps long tonight", "cat"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool = Retrieval.open(tmp_path)
    scores = _bm25(["red", "fox"], [text.split() for text in texts])
    expected = [texts[i] for i in sorted(range(5), key=lambda i: -scores[i]) if scores[i] > 0]
    assert [tool("Red fox?", again=number)[0].text for number in range(len(expected))] == expected


@pytest.mark.parametrize("query", ["", "the of", "zzzz", "?"])
def test_a_query_without_a_known_word_gives_nothing(query):
    assert Retrieval.open(DOCS)(query) == []


def test_records_carry_their_urls_and_bad_ones_are_named(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text(
        '{"text": "Paris is in France", "url": "https://example.org/paris"}\n\n{"text": "Rome is in Italy"}\n'
    )
    assert Retrieval.open(good)("Paris")[0].source == "https://example.org/paris"
    assert Retrieval.open(good)("Rome")[0].source == f"{good}:3"
    for line, message in (("no", "not JSON"), ("{}", "needs the field 'text'"), ('{"text": "a", "url": 1}', "'url'")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(UserError, match=re.escape(f"{bad}:2: ") + f".*{message}"):
            Retrieval.open(bad)


@pytest.mark.parametrize("name", ["absent", "absent.jsonl"])
def test_a_corpus_that_is_not_there_is_said(tmp_path, name):
    with pytest.raises(UserError, match="there is no such folder or file"):
        Retrieval.open(tmp_path / name)


def test_a_folder_without_text_and_a_text_without_words_are_said(tmp_path):
    with pytest.raises(UserError, match="nothing in it ends in"):
        Retrieval.open(tmp_path)
    (tmp_path / "a.txt").write_text("? !")
    with pytest.raises(UserError, match="hold no words"):
        Retrieval.open(tmp_path)


def test_hidden_folders_are_left_out(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "secret.txt").write_text("hidden treasure")
    (tmp_path / "a.txt").write_text("open treasure")
    tool = Retrieval.open(tmp_path)
    assert [tool("treasure")[0].text, tool("treasure", again=1)] == ["open treasure", []]


def test_links_out_of_the_corpus_and_into_its_hidden_folders_are_not_followed(tmp_path, caplog):
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    for folder in (corpus / ".git", corpus / "sub", outside):
        folder.mkdir(parents=True)
    (outside / "secret.txt").write_text("secret treasure")
    (corpus / ".git" / "config.txt").write_text("hidden treasure")
    (corpus / "sub" / "a.txt").write_text("open treasure")
    (corpus / "absolute.txt").symlink_to(outside / "secret.txt")
    (corpus / "relative.txt").symlink_to("../outside/secret.txt")
    (corpus / "twice.txt").symlink_to("relative.txt")
    (corpus / "hidden.txt").symlink_to(".git/config.txt")
    (corpus / "folder").symlink_to(outside)
    (corpus / "loop.txt").symlink_to("loop.txt")
    (corpus / "inside.txt").symlink_to("sub/a.txt")
    with caplog.at_level(logging.WARNING):
        tool = Retrieval.open(corpus)
    assert {passage.text for passage in tool.passages} == {"open treasure"}
    assert "4 links that lead out of it are skipped" in caplog.text
    (tmp_path / "linked").symlink_to(corpus)
    assert Retrieval.open(tmp_path / "linked")("treasure")[0].text == "open treasure"


@pytest.mark.parametrize("kept_from", [1, 1 << 22])
def test_a_file_name_that_is_not_utf_8_gives_a_source_that_json_can_say(tmp_path, monkeypatch, kept_from):
    monkeypatch.setattr(retrieval, "CACHE_FROM", kept_from)
    (tmp_path / os.fsdecode(b"\xff\xfe.txt")).write_text("zebra")
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text('{"text": "walrus"}\n')
    tool = Retrieval.open(tmp_path)
    assert tool("zebra")[0].source == f"{tmp_path}/\ufffd\ufffd.txt:1"
    assert tool("walrus")[0].source == f"{tmp_path}/\ufffd.jsonl:1"


def test_a_corpus_whose_name_is_a_pattern_or_long_leaves_other_indexes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "CACHE_FROM", 1)
    for name in ("a1.txt", "a[1].txt", "b" * 240 + ".txt"):
        (tmp_path / name).write_text("zebra")
        assert Retrieval.open(tmp_path / name)("zebra")
    assert len(list((tmp_path / ".lamda-index").iterdir())) == 3


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab. \n#é"), max_size=3000), st.sampled_from([".md", ".txt"]))
def test_passages_hold_every_word_once_in_order_and_are_short(text, suffix):
    passages = list(read_passages(Path(f"x{suffix}"), text.encode()))
    assert "".join("".join(passage.text for passage in passages).split()) == "".join(text.split())
    assert all(0 < len(passage.text) <= 4 * LENGTH for passage in passages)
    lines = text.split("\n")
    for passage in passages:
        number = int(passage.source.rsplit(":", 1)[1])
        assert passage.text.split("\n")[0].strip() in lines[number - 1]


def test_a_large_corpus_is_indexed_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "CACHE_FROM", 1)
    (tmp_path / "a.txt").write_text("the first animal is a zebra")
    (tmp_path / "b.txt").write_text("the second animal is a walrus")
    fresh = Retrieval.open(tmp_path)("zebra")
    (kept,) = (tmp_path / ".lamda-index").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Retrieval, "_build", None)  # calling it would raise
        assert Retrieval.open(tmp_path)("zebra") == fresh
    (tmp_path / "a.txt").write_text("the first animal is a heron")
    assert Retrieval.open(tmp_path)("zebra") == []
    assert Retrieval.open(tmp_path)("heron")[0].source == f"{tmp_path / 'a.txt'}:1"
    (made,) = (tmp_path / ".lamda-index").iterdir()
    assert made != kept
    assert not list((tmp_path / ".lamda-index").rglob("*.pkl"))


def test_an_index_that_could_not_be_finished_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(retrieval, "CACHE_FROM", 1)
    (tmp_path / "a.txt").write_text("zebra")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrieval, "sync_file", full)
    with caplog.at_level(logging.WARNING):
        assert Retrieval.open(tmp_path)("zebra")
    assert "is not cached (No space left on device)" in caplog.text
    assert list((tmp_path / ".lamda-index").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.csc.index.npy", b""),
        ("passages.jsonl", b""),
        ("passages.jsonl", b'["zebra","a.txt:1"]\n["walr'),
        ("passages.jsonl", b'["zebra","a.txt:1"]\n["walrus","b.txt:1"]\n["heron","c.txt:1"]\n'),
        ("passages.jsonl", b"[1]\n[]\n"),
        ("params.index.json", b"[]"),
        ("params.index.json", b"{}"),
    ],
)
def test_a_damaged_index_is_said(tmp_path, monkeypatch, file, content):
    monkeypatch.setattr(retrieval, "CACHE_FROM", 1)
    (tmp_path / "a.txt").write_text("zebra")
    (tmp_path / "b.txt").write_text("walrus")
    Retrieval.open(tmp_path)
    (kept,) = (tmp_path / ".lamda-index").iterdir()
    assert (kept / file).is_file()
    (kept / file).write_bytes(content)
    with pytest.raises(UserError, match="remove it, and it is made again"):
        Retrieval.open(tmp_path)


def test_retrieval_without_bm25s_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'lamda-pytorch\[tools\]'"):
        Retrieval.open(DOCS)


def test_the_toolset_tries_every_tool_and_joins_in_the_papers_order(tmp_path):
    corpus, glossary = tmp_path / "c.jsonl", tmp_path / "g.jsonl"
    corpus.write_text(json.dumps({"text": "hello is a word that French people hear"}) + "\n" + '{"text": "15 80"}\n')
    glossary.write_text('{"source": "en", "target": "fr", "text": "hello", "translation": "bonjour"}\n')
    toolset = open_toolset(["retrieval", "translator", "calculator"], corpus=corpus, glossary=glossary)
    assert [tool.name for tool in toolset.tools] == ["calculator", "translator", "retrieval"]
    assert [result.text for result in toolset("hello in French")] == [
        "bonjour",
        "hello is a word that French people hear",
    ]
    assert [result.text for result in toolset("15% of 80")] == ["12", "15 80"]
    assert [result.text for result in toolset("15% of 80", again=1)] == ["12"]


def test_a_tool_that_lacks_something_is_said_and_the_others_answer(tmp_path, caplog):
    glossary = tmp_path / "g.jsonl"
    glossary.write_text("")
    toolset = open_toolset(["translator", "calculator"], glossary=glossary)
    assert toolset("1+1 in French") == Toolset(())("")
    assert "translator: the glossary has no words from en to fr" in caplog.text
    assert toolset("1+1")[0].text == "2"


@pytest.mark.parametrize("error", [ValueError, TypeError, AssertionError, IndexError, MemoryError, RecursionError])
def test_a_tool_that_fails_costs_its_answer_alone(caplog, error):
    class Broken:
        name = "broken"

        def __call__(self, query, *, again=0):
            raise error("inside")

    assert [result.text for result in Toolset((Broken(), Calculator()))("1+1")] == ["2"]
    assert "broken: failed on a query of 3 characters" in caplog.text
    assert error.__name__ in caplog.text


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (["calclator"], {}, "there is no tool 'calclator'"),
        (["retrieval"], {}, "go together"),
        (["calculator"], {"corpus": DOCS}, "go together"),
        (["calculator"], {"glossary": DOCS}, "add it to --tools"),
    ],
)
def test_tools_that_do_not_fit_are_refused(names, files, message):
    with pytest.raises(UserError, match=message):
        open_toolset(names, **files)
