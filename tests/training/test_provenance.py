"""Each start says where it came from, without secrets, and a resume says what differs, one line each."""

import json
import os
import subprocess
import sys

import pytest

from lamda.config import Config
from lamda.storage import commit
from lamda.storage.run_directory import RunDirectory
from lamda.training import provenance
from lamda.training.changes import report_start
from lamda.training.provenance import describe_start, git_state

RECORD = {
    "lamda": "0.1.0",
    "git": {"commit": "a" * 40, "dirty": False},
    "source": "0123456789ab",
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "cuda": None,
    "driver": None,
    "ranks": 2,
    "hosts": {"AMD EPYC, 64 cores, 8 x NVIDIA H100": 2},
    "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "start.json").write_text(json.dumps(RECORD))
    commit.seal(tmp_path, {"files": {"start.json": commit.sync_and_describe(tmp_path / "start.json")}})
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"git": {"commit": "b" * 40, "dirty": True}}, [f"commit {'a' * 12} -> {'b' * 12} with changes"]),
        ({"source": "ba9876543210"}, ["lamda's source 0123456789ab -> ba9876543210"]),
        ({"git": None, "source": "ba9876543210"}, [f"commit {'a' * 12} -> None"]),
        ({"packages": {"torch": "2.14.0", "deepspeed": "0.19.8"}}, ["torch 2.13.0 -> 2.14.0"]),
        ({"cuda": "13.0", "driver": "580.1"}, ["CUDA None -> 13.0", "NVIDIA driver None -> 580.1"]),
        ({"ranks": 8}, ["ranks 2 -> 8"]),
        (
            {"hosts": {"AMD EPYC, 64 cores, 8 x NVIDIA H200": 2}},
            ["machines 2 x (AMD EPYC, 64 cores, 8 x NVIDIA H100) -> 2 x (AMD EPYC, 64 cores, 8 x NVIDIA H200)"],
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "timers": {}}},
            ["DeepSpeed's zero_optimization.stage 1 -> 3"],
        ),
    ],
)
def test_each_part_that_differs_is_one_line(checkpoint, caplog, changes, lines):
    report_start(RECORD | changes, checkpoint, step=401)
    assert caplog.messages == [f"{line} from step 401 on" for line in lines]


def test_a_checkpoint_of_an_earlier_version_is_not_compared(tmp_path, caplog):
    commit.seal(tmp_path, {"files": {}})
    report_start(RECORD, tmp_path, step=401)
    assert caplog.messages == []


def test_a_record_holds_code_libraries_machine_and_settings_and_no_secrets(monkeypatch, world):
    monkeypatch.setenv("WANDB_API_KEY", "canary-key")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data.files", "https://user:canary-key@host/a.jsonl"])
    record = describe_start(Config(train={"steps": 7}), world, framework="deepspeed")
    assert record["packages"]["torch"] == provenance.versions(["torch"])["torch"]
    assert record["config"]["train"]["steps"] == 7
    assert record["deepspeed"]["zero_optimization"]["stage"] == 1
    assert record["command"] == ["pretrain.py", "--data.files", "https://***@host/a.jsonl"]
    assert list(record["hosts"].values()) == [1]
    text = json.dumps(record)
    assert "canary" not in text
    assert os.uname().nodename not in text


def test_the_commit_is_that_of_the_code_and_an_edit_makes_it_dirty(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    file = package / "__init__.py"
    file.write_text("a = 1\n")
    monkeypatch.setattr(provenance, "_SOURCE", package)
    git("init", "-q")
    assert git_state() is None, "a package inside another project's repository is not that project's code"
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "dirty": False}
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a hook of another repository has it
    before = provenance.code_digest()
    file.write_text("a = 2\n")
    assert git_state() == {"commit": commit, "dirty": True}
    assert provenance.code_digest() != before
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None, "without git"


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.note_start({"step": 0})
    with directory.starts.open("a") as stream:
        stream.write('{"step": 4')
    directory.note_start({"step": 8})
    assert directory.starts.read_text().splitlines() == ['{"step": 0}', '{"step": 4', '{"step": 8}']
