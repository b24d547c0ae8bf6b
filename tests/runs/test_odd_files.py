"""A command that reads runs answers with words, never with a traceback or a wait, whatever stands in a run's files."""

import json
import os
import signal

import numpy as np
import pytest

from lamda.cli import main
from lamda.config.loading import load_config
from lamda.data.corpus import open_corpus, packing_of
from lamda.data.loader import Loader, batch_digest
from lamda.data.tokenizer import Tokenizer
from lamda.storage.run_directory import RunDirectory
from tests.conftest import make_text, write_shard
from tests.runs.conftest import leave_status, make_run, save_checkpoint

ODD = {
    "list": b"[]\n",
    "deep": b"[" * 100_000,
    "zeros": b"\0" * 4096,
    "pipe": None,
    "folder": None,
}
FILES = ["status.json", "metrics.jsonl"]
COMMANDS = [
    ("runs", "{parent}"), ("watch", "{run}"), ("checkpoint", "ls", "{run}"), ("checkpoint", "verify", "{run}"),
]  # fmt: skip


def put(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(ODD[kind])


@pytest.fixture
def run(tmp_path, weights):
    directory = make_run(tmp_path / "runs" / "one", losses=[3.0, 2.5], samples=8, tokens=8, skipped_steps=0)
    leave_status(directory, "finished", step=2, steps=2)
    save_checkpoint(directory.path, 2, weights(0))
    return directory.path


@pytest.fixture(autouse=True)
def _no_command_waits():
    def end(*_):
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_every_reader_answers(run, capsys, name, kind):
    put(run / name, kind)
    for command in COMMANDS:
        words = [word.format(run=run, parent=run.parent) for word in command]
        if command[0] == "watch" and name == "status.json":
            continue  # it waits for the run, as it says
        assert main(words) in (0, 1, 2), words
        capsys.readouterr()


LOSSES = {"huge": [1e308, -1e308], "infinite": [3.0, float("inf")], "zero": [0.0, 0.0]}
NAMES = ["_hidden", "$\\nothing$", "a\nb\x1b[31m", b"\xff\xfe".decode("utf-8", "surrogateescape"), "<b>&\"'"]


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("tokens", [8, 0, -8, 10**18])
def test_any_number_can_be_drawn(tmp_path, losses, tokens):
    run = make_run(tmp_path / "run", losses=LOSSES[losses], tokens=tokens, grad_norm=1.0)
    assert main(["report", str(run.path), "-o", str(tmp_path / "report.html")]) == 0
    for x in ("step", "tokens"):
        assert main(["plot", str(run.path), "-o", str(tmp_path / "loss.svg"), "--x", x]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(tmp_path, capsys, name):
    run = make_run(tmp_path / "runs" / name, losses=[3.0, 2.5], tokens=8)
    assert main(["plot", str(run.path), "-o", str(tmp_path / "loss.svg")]) == 0
    assert main(["report", str(run.path), "-o", str(tmp_path / "report.html")]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.isprintable()


def test_a_figure_of_any_size_leaves_the_table_readable(tmp_path, capsys):
    make_run(tmp_path / "runs" / "huge", losses=[1e308], tokens=8)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "1e+308" in capsys.readouterr().out


@pytest.mark.parametrize("step", [-1, True, "2", 2.5])
def test_what_is_no_step_is_no_row(tmp_path, capsys, step):
    run = make_run(tmp_path / "run")
    run.metrics.write_text(json.dumps({"step": step, "loss": 3.0, "tokens": 8}) + "\n")
    assert main(["plot", str(run.path), "-o", str(tmp_path / "loss.svg")]) == 2
    assert "line 1: is no row of metrics" in capsys.readouterr().err


def test_nobody_is_asked_whether_he_means_what_he_wrote(tmp_path, capsys):
    run = make_run(tmp_path / "runs" / "empty")
    leave_status(run, "failed")
    assert main(["report", str(run.path), "-o", str(tmp_path / "report.html")]) == 2
    assert "did you mean" not in capsys.readouterr().err


def first_digest(run):
    config = load_config(["--config", str(run.config)])
    loader = Loader(
        open_corpus(config.data),
        Tokenizer.load(run.tokenizer),
        packing=packing_of(config),
        seed=config.run.seed,
        batch=config.train.global_batch_size,
        micro_batch=1,
        rank=0,
        world_size=1,
    )
    with loader:
        step = next(iter(loader))
    return batch_digest(step.digests[np.argsort(step.positions)])


@pytest.mark.parametrize("manifest", [b"", b"[]", b"\xff\0", b"{}"])
def test_a_row_is_found_without_a_checkpoint_whose_manifest_is_damaged(tmp_path, capsys, tokenizer_path, manifest):
    text = write_shard(tmp_path / "text.jsonl", [make_text(n, 60) for n in range(30)])
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(
        f"model: {{vocab_size: 400}}\ndata: {{files: [{text}], eval_files: [{text}], sequence_length: 16}}\n"
        "train: {steps: 2, global_batch_size: 2, micro_batch_size: 2}\n"
    )
    run.tokenizer.write_bytes(tokenizer_path.read_bytes())
    make_run(run.path, losses=[3.0], samples=2, tokens=32, batch_digest=first_digest(run))
    damaged = run.checkpoints / "step-00000001"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_bytes(manifest)
    assert main(["where", str(run.path), "--step", "1", "--row", "0"]) == 0
    assert "text.jsonl, line" in capsys.readouterr().out
    make_run(run.path, losses=[3.0], samples=2, tokens=32, batch_digest="0" * 16)
    assert main(["where", str(run.path), "--step", "1", "--row", "0"]) == 2
    assert "do not match its batch_digest" in capsys.readouterr().err
