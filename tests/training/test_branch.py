"""A branch continues bit for bit as its parent, or with other text from its beginning; nothing else is inherited."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lamda.cli import main as lamda
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.data.corpus import open_corpus, packing_of
from lamda.data.loader import Loader, batch_digest
from lamda.data.tokenizer import Tokenizer
from lamda.runs.branch import main
from lamda.storage.manifest import read_state
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from tests.conftest import make_text, write_shard
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT

EXACT = ("step", "loss", "lr", "grad_norm", "batch_digest", "tokens", "samples", "epoch/files")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_path):
    """A finished run `parent` of 10 steps, and other text."""
    place = Place.make(tmp_path_factory.mktemp("branch"), tokenizer_path)
    write_shard(place.folder / "other.jsonl", [make_text(400 + n, 90) for n in range(40)])
    done = train(place.folder / "run.yaml", "--run.dir", str(place.folder / "parent"))
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def train(config, *flags):
    return subprocess.run(
        [sys.executable, "-m", "tests.training.plain_framework", "--config", str(config), *flags],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def rows(path):
    return [[row[name] for name in EXACT] for row in read_metrics(path / "metrics.jsonl")]


def test_a_branch_without_changes_continues_as_its_parent(place, capsys):
    parent, branch = place.folder / "parent", place.folder / "branch"
    assert lamda(["branch", f"{parent}@6", "--to", str(branch)]) == 0
    assert f"--config {branch}/config.yaml" in capsys.readouterr().out
    done = train(branch / "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(branch) == rows(parent)
    ends = [run / "checkpoints" / "step-00000010" for run in (parent, branch)]
    for name in ("model.safetensors", "state/moments.safetensors", "run_state.json"):
        assert len({(end / name).read_bytes() for end in ends}) == 1, name
    assert lamda(["list", str(place.folder)]) == 0
    listed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [str(parent), f"└ {branch}"] == listed[listed.index(str(parent)) :][:2]


def test_a_branch_with_other_text_reads_it_from_the_beginning(place):
    parent, branch = place.folder / "parent", place.folder / "fresh"
    flags = ("--data.files", str(place.folder / "other.jsonl"), "--train.steps", "12", "--train.lr", "1e-3")
    main([f"{parent}@6", "--to", str(branch), *flags])
    refused = train(branch / "config.yaml")
    assert refused.returncode == 2
    assert "the data differs from the checkpoint" in refused.stderr
    assert "lamda branch --fresh-data" in refused.stderr
    assert len(read_metrics(branch / "metrics.jsonl")) == 6

    main([f"{parent}@6", "--to", str(branch := place.folder / "fresh-data"), "--fresh-data", *flags])
    done = train(branch / "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(branch)[:6] == rows(parent)[:6]
    config = load_config(["--config", str(branch / "config.yaml")])
    tokenizer = Tokenizer.load(branch / "tokenizer.model")
    with Loader(
        open_corpus(config.data), tokenizer, packing=packing_of(config), seed=0, batch=8, micro_batch=8,
        rank=0, world_size=1,
    ) as loader:  # fmt: skip
        steps = [step for step, _ in zip(loader, range(6), strict=False)]
    expected = [batch_digest(step.digests[np.argsort(step.positions)]) for step in steps]
    assert [row["batch_digest"] for row in read_metrics(branch / "metrics.jsonl")[6:]] == expected
    assert read_state(branch / "checkpoints" / "step-00000012").start.sample == 48


def test_a_folder_that_exists_and_a_damaged_checkpoint_are_refused(place, tmp_path):
    parent = place.folder / "parent"
    with pytest.raises(UserError, match=r"exists already; choose another folder"):
        main([f"{parent}@6", "--to", str(tmp_path)])
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has 3, 6, 9, 10"):
        main([f"{parent}@5", "--to", str(tmp_path / "new")])
    with pytest.raises(UserError, match=r"train\.stepss: there is no such key; did you mean 'train\.steps'"):
        main([f"{parent}@6", "--to", str(tmp_path / "new"), "--train.stepss", "3"])
    file = parent / "checkpoints" / "step-00000003" / "run_state.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"step": 4}))
    with pytest.raises(UserError, match=r"run_state\.json has .* bytes|run_state\.json has changed"):
        main([f"{parent}@3", "--to", str(tmp_path / "new")])
    file.write_text(whole)
    for flags, message in (
        (("--model.d_model", "64"), r"is a checkpoint of another model: d_model is 32, the configuration says 64"),
        (("--train.optimizer", "adafactor"), r"holds the state of adamw, which train\.optimizer adafactor cannot"),
        (("--data.document_mask=true",), r"compute something else: data\.document_mask False -> True"),
        (("--run.dir", "elsewhere"), r"--run\.dir: a branch begins in the folder --to"),
    ):
        with pytest.raises(UserError, match=message):
            main([f"{parent}@6", "--to", str(tmp_path / "new"), *flags])
    with pytest.raises(UserError, match=r"/@6: no checkpoint here"):
        main([f"{parent}/@6", "--to", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_its_run_deletes_meanwhile_and_a_kill_leave_no_run(place, tmp_path, monkeypatch):
    parent = shutil.copytree(place.folder / "parent", tmp_path / "parent")

    def delete(source, target):
        shutil.rmtree(parent / "checkpoints" / "step-00000006")
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", delete)
        with pytest.raises(UserError, match=r"its run has deleted it meanwhile"):
            main([f"{parent}@6", "--to", str(tmp_path / "new")])
        assert not (tmp_path / "new").exists()
        patch.setattr(os, "link", lambda *_: 1 / 0)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        with pytest.raises(ZeroDivisionError):
            main([f"{parent}@9", "--to", str(tmp_path / "new")])
    assert RunDirectory(tmp_path / "new").noted_checkpoint() == 9, "it does not start over"
