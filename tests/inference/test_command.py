"""`lamda generate` on a run of random weights."""

from __future__ import annotations

import json
import shutil

import pytest

from lamda.cli import main
from lamda.config.errors import UserError
from lamda.inference.generation import TextStream
from lamda.inference.loading import find_checkpoint, load_run
from lamda.inference.sampling import Sampling
from lamda.storage import manifest
from tests.generation import generate
from tests.random_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_path):
    return write_run(tmp_path_factory.mktemp("runs") / "random", tokenizer_path)


def message(capsys, *words):
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_it_writes_what_the_model_generates(run, capsys):
    loaded = load_run(run)
    stop = frozenset(loaded.tokenizer.symbols.values())
    prompt = [loaded.tokenizer.end_of_document, *loaded.tokenizer.encode("the of")]
    (ids,) = generate(loaded.model, [prompt], Sampling(max_new_tokens=20, seed=3, stop_ids=stop))
    text = message(capsys, run, "--prompt", "the of", "--max-new-tokens", 20, "--seed", 3)
    assert text == loaded.tokenizer.decode(ids) + "\n"
    report = json.loads(message(capsys, run, "--prompt", "the of", "--max-new-tokens", 20, "--seed", 3, "--json"))
    assert [each["ids"] for each in report["candidates"]] == [ids]


def test_candidates_differ_and_int8_generates(run, capsys):
    words = (run, "--prompt", "", "--max-new-tokens", 9, "--candidates", 3, "--json", "--int8")
    texts = [each["text"] for each in json.loads(message(capsys, *words))["candidates"]]
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
    assert "".join(map(cut.add, ids)) + cut.end() == tokenizer.decode(ids) == "a"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a", "--temperature", "-1", "--top-p", "0"], "temperature is -1.0"),
        (["--prompt", "a", "--candidates", "0"], "candidates is 0"),
    ],
)
def test_mistakes_are_reported(run, capsys, words, expected):
    assert main(["generate", str(run), *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_reported(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err


@pytest.fixture
def two_checkpoints(tmp_path, tokenizer_path):
    """A run with checkpoints of steps 1 and 2."""
    path = write_run(tmp_path / "run", tokenizer_path)
    first, second = (path / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    shutil.copytree(first, second)
    content = manifest.read(second)
    (second / "manifest.json").write_text(manifest.sealed({"step": 2, "files": content["files"]}))
    return path


def test_a_step_is_named_and_the_newest_is_taken_whatever_latest_says(two_checkpoints, capsys):
    run = two_checkpoints
    for latest in ("step-00000001", "step-00000009", ""):
        (run / "checkpoints" / "LATEST").write_text(latest)
        assert find_checkpoint(run).name == "step-00000002"
    assert find_checkpoint(run.with_name("run@1")).name == "step-00000001"
    assert message(capsys, f"{run}@1", "--prompt", "a", "--max-new-tokens", 2)
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has 1, 2"):
        find_checkpoint(run.with_name("run@7"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "tokenizer.model", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "unnamed", "missing"])
def test_what_is_damaged_or_not_named_is_not_read(two_checkpoints, capsys, name, how):
    checkpoint = two_checkpoints / "checkpoints" / "step-00000002"
    if how == "changed":
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)
    elif how == "missing" or name == "manifest.json":
        (checkpoint / name).unlink()
    else:
        content = manifest.read(checkpoint)
        del content["files"][name], content["sha256"]
        (checkpoint / "manifest.json").write_text(manifest.sealed(content))
    assert main(["generate", str(two_checkpoints), "--prompt", "a"]) == 2
    errors = capsys.readouterr().err
    assert str(checkpoint) in errors
    assert name in errors


def test_what_is_no_checkpoint_is_reported_with_what_to_do(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    export = tmp_path / "export"
    export.mkdir()
    shutil.copy(run / "checkpoints" / "step-00000001" / "model.safetensors", export)
    (export / "config.json").write_text("{}")
    for path, wanted in (
        (tmp_path / "notes.txt", "neither a checkpoint nor a run"),
        (run / "checkpoints" / "LATEST", "neither a checkpoint nor a run"),
        (export, f"`lamda import {export} --to DIR` brings an export back"),
    ):
        assert main(["generate", str(path), "--prompt", "a"]) == 2
        assert wanted in capsys.readouterr().err


def test_a_terminal_obeys_no_text_and_a_pipe_gets_it_as_it_is(run, capsys, monkeypatch):
    words = (run, "--prompt", "\x1b[31m", "--max-new-tokens", 1, "--candidates", 2)
    assert "\x1b[31m" in message(capsys, *words)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = message(capsys, *words)
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown


def test_weights_that_cannot_be_read_are_named(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step-00000001"
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert f"{tmp_path}/model.safetensors: cannot be read" in capsys.readouterr().err
