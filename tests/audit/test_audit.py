"""Planted duplicates, overlaps and strings are found in their numbers, alone or in shards, in hostile text too."""

import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.audit import duplicates, records
from lamda.audit.findings import find
from lamda.audit.records import BEGINNING, DOCUMENT, Writer
from lamda.cli import main
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.data.corpus import open_corpus
from lamda.data.drop_list import DropList
from lamda.data.hashing import document_hash
from tests.conftest import make_text
from tests.launch import ROOT


def unlike(seed, words=120):
    """A text that shares no n-gram with others."""
    draw = random.Random(seed)
    return " ".join(f"{draw.choice('abcdefgh')}{draw.randrange(10**6)}x" for _ in range(words))


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(capsys, *words):
    """The JSON of a command."""
    assert main(["data", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def planted(tmp_path):
    """A folder of three files and evaluation text, with what is to be found in them."""
    texts = [unlike(seed) for seed in range(300)]
    evaluation = [unlike(1000 + n, 40) for n in range(4)] + ["too short"]
    for copy in (130, 220, 280):
        texts[copy] = texts[5]
    words = texts[7].split()
    words[60] = "another"
    texts[150] = " ".join(words)  # similarity 0.92
    texts[151] = texts[150]
    texts[20] = " ".join([*texts[20].split(), *evaluation[1].split()[10:30]])
    texts[21] = " ".join([*texts[21].split(), *evaluation[1].split()[3:16]]).upper()
    texts[22] = " ".join([*texts[22].split(), *evaluation[2].split()[:12]])  # one word too few
    texts[30] += " write to someone@example.org and other@example.org"
    texts[31] = "\n".join(["the same line"] * 50 + ["another one"])
    texts[32] = "--- ... \t\n"
    texts[33] += " caf\u00c3\u00a9 \ufffd \x00"
    for number in range(3):
        write(tmp_path / f"text/{number}.jsonl", texts[100 * number : 100 * number + 100])
    with (tmp_path / "text/1.jsonl").open("a") as file:
        file.write("{no json\n")
    write(tmp_path / "evaluation.jsonl", evaluation)
    return tmp_path, texts


def test_an_audit_finds_what_was_planted(planted, capsys):
    folder, texts = planted
    found = run(capsys, "audit", f"{folder}/text/*", "--against", folder / "evaluation.jsonl")
    assert (found["files"], found["documents"]) == (3, 300)
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["exact"] == {"documents": 4, "bytes": 3 * len(texts[5]) + len(texts[150])}
    assert found["near"] == {"documents": 1, "bytes": len(texts[150])}
    assert found["overlap"]["documents"] == 2
    assert found["overlap"]["ngrams"] == 8 + 1
    assert found["overlap"]["evaluation_documents_found"] == 1
    assert found["overlap"]["evaluation_documents_too_short"] == 1
    assert found["empty"] == 1
    tables = found["tables"]
    assert {name: row[0] for name, row in tables["sources"].items()} == {f"{n}.jsonl": 100 for n in range(3)}
    assert tables["pii"] == {"email address": [1, 2]}
    assert tables["encoding"] == {
        name: [1] for name in ("control characters", "decoded twice", "replacement characters (U+FFFD)")
    }
    assert tables["repeated lines"]["9"] == [1, 49, 49 * len("the same line")]
    assert tables["bad lines"] == {"not JSON": [1]}
    assert found["examples"]["emptiest"][0]["line"] == 33
    assert found["groups"]["exact"][0]["documents"] == 4
    assert "someone@example.org" not in json.dumps(found)


def test_a_list_leaves_out_what_was_planted_and_keeps_the_first(planted, capsys):
    folder, texts = planted
    found = run(capsys, "clean", f"{folder}/text/*", "--against", folder / "evaluation.jsonl", "--to", folder / "list")
    assert {name: each["documents"] for name, each in found["drop"].items()} == {
        "overlap": 2, "empty": 1, "exact": 4, "near": 1,
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "list").read_text().splitlines()][1:]
    reasons = {line["hash"]: line["reason"] for line in lines}
    assert reasons == {
        document_hash(texts[5]): "exact duplicate",
        document_hash(texts[150]): "near duplicate",
        document_hash(texts[20]): "evaluation overlap",
        document_hash(texts[21]): "evaluation overlap",
        document_hash(texts[32]): "no letter or digit",
    }
    entries = DropList.of(str(folder / "list")).entries()
    assert len(entries) == 5
    flags = ["--data.files", f"{folder}/text/*", "--data.drop", f"{folder}/list", "--train.steps", "1"]
    gone = {20, 21, 32, 130, 150, 151, 220, 280}
    kept = sorted(document.text for document in open_corpus(load_config(flags).data).documents_once())
    assert kept == sorted(text for number, text in enumerate(texts) if number not in gone)


def test_only_the_chosen_reasons_count(planted, capsys):
    folder, _ = planted
    found = run(capsys, "clean", f"{folder}/text/*", "--drop", "pii,exact", "--to", folder / "list")
    assert {name: each["documents"] for name, each in found["drop"].items()} == {"pii": 1, "exact": 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clean", "TEXT", "--to", "LIST", "--drop", "overlap"], "--drop overlap: was not looked for; --against names"),
        (["clean", "TEXT", "--to", "LIST", "--drop", "nearr"], "there is no 'nearr'; there are .* did you mean 'near'"),
        (["clean", "TEXT", "--to", "EVAL"], "evaluation.jsonl exists already"),
        (["clean", "TEXT", "--to", "/none/list"], "/none/list: there is no folder"),
        (["audit", "TEXT", "--html", "/none/page.html"], "/none/page.html: there is no folder"),
        (["audit"], "name the text"),
        (["audit", "TEXT", "--without", "far"], "--without: there is no 'far'"),
        (["audit", "TEXT", "--memory", "0"], "is a number of gigabytes"),
        (["audit", "TEXT", "--memory", "0.00001"], "documents need .* GB .* raise --memory"),
        (["audit", "TEXT", "--against", "EVAL", "--memory", "0.000001"], "the n-grams of --against need more"),
        (["audit", "TEXT", "--shard", "3/2", "--to", "LIST"], "a number I from 1 to N"),
        (["audit", "TEXT", "--shard", "1/2"], "both are needed"),
        (["audit", "TEXT", "--html", "page.txt"], "a page is a .html file"),
        (["audit", "nothing-here.jsonl"], "no file matches"),
    ],
)
def test_a_mistake_is_named(planted, capsys, words, message):
    folder, _ = planted
    names = {"TEXT": f"{folder}/text/*", "LIST": f"{folder}/list", "EVAL": f"{folder}/evaluation.jsonl"}
    before = (folder / "evaluation.jsonl").read_bytes()
    assert main(["data", *(names.get(word, word) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (folder / "evaluation.jsonl").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.jsonl", "text"]


DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=12
)  # a base text, and how many of its words differ


@settings(max_examples=12, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_shards_in_any_order_give_the_list_of_the_whole(tmp_path_factory, files, shards, draw):
    folder = tmp_path_factory.mktemp("shards")
    evaluation = write(folder / "evaluation.jsonl", [unlike(4, 30)])
    for number, documents in enumerate(files):
        texts = []
        for base, changes in documents:
            words = unlike(base, 30).split()
            words[:changes] = [f"changed{changes}"] * changes
            texts.append(" ".join(words))
        write(folder / f"text/{number}.jsonl", texts)
    text = f"{folder}/text/*"
    assert main(["data", "clean", text, "--against", str(evaluation), "--to", str(folder / "whole"), "--json"]) == 0
    parts = [str(folder / f"part-{number}") for number in range(1, shards + 1)]
    for number, part in enumerate(parts, start=1):
        shard = ["--shard", f"{number}/{shards}", "--to", part]
        assert main(["data", "audit", text, "--against", str(evaluation), *shard]) == 0
    draw.shuffle(parts)
    assert main(["data", "clean", *parts, "--to", str(folder / "merged"), "--json"]) == 0
    assert (folder / "merged").read_bytes() == (folder / "whole").read_bytes()


def test_two_workers_audit_shards_whose_report_is_that_of_the_whole(planted, capsys):
    folder, _ = planted
    text = ["audit", f"{folder}/text/*", "--against", str(folder / "evaluation.jsonl")]
    program = "import sys; from lamda.cli import main; sys.exit(main())"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, "data", *text, "--shard", f"{number}/2", "--to", folder / f"part-{number}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in (1, 2)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert run(capsys, "audit", folder / "part-2", folder / "part-1") == run(capsys, *text)
    assert main(["data", "audit", str(folder / "part-1")]) == 2
    assert "the shards are 1 of 2" in capsys.readouterr().err
    assert main(["data", *text, "--shard", "1/2", "--to", str(folder / "part-1")]) == 2
    assert "exists already" in capsys.readouterr().err
    (folder / "part-1/documents").write_bytes(b"cut")
    assert main(["data", "audit", str(folder / "part-1"), str(folder / "part-2")]) == 2
    assert "is no shard of an audit (documents has 3 bytes)" in capsys.readouterr().err


def test_shards_of_another_text_are_refused(planted, capsys):
    folder, _ = planted
    for number, text in ((1, "*"), (2, "[01]*")):
        shard = ["--shard", f"{number}/2", "--to", str(folder / f"part-{number}")]
        assert main(["data", "audit", f"{folder}/text/{text}", *shard]) == 0
    assert main(["data", "clean", str(folder / "part-1"), str(folder / "part-2"), "--to", str(folder / "list")]) == 2
    assert "its files are not those of" in capsys.readouterr().err


def test_hostile_documents_are_counted_and_escaped(tmp_path, capsys):
    attack = "<script>alert(1)</script> <img src=x onerror=alert(2)> \x1b[31m \u202e {{ 7*7 }}"
    texts = [
        "a" * 10_000_000,
        "\x00\x1b\x7f" * 1000,
        "<b>",
        "中国" * 5000,
        "1 " * 100_000,
        "",
        " ",
        *[f"{attack} {make_text(1, 40)}"] * 3,
        f"{attack} {make_text(1, 39)} end",
    ]
    write(tmp_path / "<i>.jsonl", texts)
    assert main(["data", "audit", f"{tmp_path}/*.jsonl", "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "11 documents" in out
    assert "\x1b" not in out
    page = (tmp_path / "page.html").read_text()
    assert all(part not in page for part in ("<script", "<img src", "<i>", "<b>", "\x1b", "\u202e"))
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src &#39;none&#39;" in page


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_is_full_at_the_end_is_named_and_nothing_is_left(tmp_path):
    with Writer(tmp_path / "s") as writer:
        writer._files[0].close()
        writer._files[0] = Path("/dev/full").open("wb")  # noqa: SIM115 - the writer closes it
        writer.add(np.zeros(1, DOCUMENT), np.zeros(1, BEGINNING), np.zeros((0, 1)))
        with pytest.raises(UserError, match=r"No space left on device.*bytes per document"):
            writer.finish({})
    assert not list(tmp_path.iterdir())


def test_texts_without_a_domain_are_counted_by_file_and_files_that_are_texts_by_folder(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "notes" / name).write_text("some words")
    write(tmp_path / "c.jsonl", ["some", "words"])
    (tmp_path / "d.jsonl").write_text('{"text": "other", "meta": {"pile_set_name": "Books"}}\n')
    tables = run(capsys, "audit", tmp_path)["tables"]
    sources, lengths = tables["sources"], tables["lengths"]
    assert {name: row[0] for name, row in lengths.items()} == {"3": 3, "4": 2}
    assert {name: row[0] for name, row in sources.items()} == {"notes/": 2, "c.jsonl": 2, "Books": 1}


def test_a_report_without_documents_is_one(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("{}\n" * 3)
    found = run(capsys, "audit", f"{tmp_path}/x.jsonl", "--html", tmp_path / "page.html")
    assert found["documents"] == 0
    assert [row[0] for row in found["tables"]["bad lines"].values()] == [3]
    assert (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize("kinds", [9_000, 1])
def test_finding_duplicates_takes_the_memory_that_it_asks_for(tmp_path, kinds, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", 1024)
    count, draw = 30_000, np.random.default_rng(0)
    documents = np.zeros(count, records.DOCUMENT)
    documents["hash"], documents["byte"], documents["flags"] = np.arange(count), np.arange(count)[::-1], records.SIGNED
    with records.Writer(tmp_path / "shard") as writer:
        signatures = np.repeat(draw.integers(0, kinds, (count, 1)).astype(np.uint32), records.SIGNATURE, axis=1)
        writer.add(documents, np.zeros(count, records.BEGINNING), signatures)
        writer.finish({"shard": [1, 1], "documents": count, "files": [], "options": {}})
    del documents, signatures
    tracemalloc.start()
    try:
        shards = records.Shards.read([tmp_path / "shard"], memory=count * records.BYTES_PER_DOCUMENT)
        near = find(shards, {"exact", "near"}).counts()["near"][0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert near == count - kinds if kinds == 1 else near < count
    assert peak < count * records.BYTES_PER_DOCUMENT + (3 << 20)
