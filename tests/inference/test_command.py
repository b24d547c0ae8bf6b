"""`lamda generate` on a run of random weights."""

from __future__ import annotations

import json

import pytest

from lamda.cli import main
from lamda.inference.generation import generate
from lamda.inference.loading import load_run
from lamda.inference.sampling import Sampling
from lamda.inference.text import TextStream
from tests.random_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path):
    return write_run(tmp_path_factory.mktemp("runs") / "random", tokenizer_path)


def told(capsys, *words):
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_it_writes_what_the_model_generates(run, capsys):
    loaded = load_run(run)
    stop = frozenset(loaded.tokenizer.symbols.values())
    prompt = [loaded.tokenizer.end_of_document, *loaded.tokenizer.encode("the of")]
    (ids,) = generate(loaded.model, [prompt], Sampling(max_new_tokens=20, seed=3, stop_ids=stop))
    text = told(capsys, run, "--prompt", "the of", "--max-new-tokens", 20, "--seed", 3)
    assert text == loaded.tokenizer.decode(ids) + "\n"
    report = json.loads(told(capsys, run, "--prompt", "the of", "--max-new-tokens", 20, "--seed", 3, "--json"))
    assert [each["ids"] for each in report["candidates"]] == [ids]


def test_candidates_differ_and_int8_generates(run, capsys):
    words = (run, "--prompt", "", "--max-new-tokens", 9, "--candidates", 3, "--json", "--int8")
    texts = [each["text"] for each in json.loads(told(capsys, *words))["candidates"]]
    assert len({*texts}) == 3


def test_no_piece_of_a_character_is_written(tokenizer):
    text = "naïve 🙂 – 漢字\n"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    parts = [stream.add(id) for id in ids]
    assert "".join(parts) + stream.end() == text
    assert "" in parts
    assert not any("\ufffd" in part for part in parts)
    cut = TextStream(tokenizer)
    ids = tokenizer.encode("a🙂")[:-1]
    assert "".join(map(cut.add, ids)) + cut.end() == tokenizer.decode(ids) == "a\ufffd"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a", "--temperature", "-1", "--top-p", "0"], "temperature is -1.0"),
        (["--prompt", "a", "--candidates", "0"], "candidates is 0"),
    ],
)
def test_mistakes_are_told(run, capsys, words, expected):
    assert main(["generate", str(run), *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err
