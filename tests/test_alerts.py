"""What a run's owner must look at reaches W&B: refused steps, rollbacks, failed saves, bad lines, hangs, the end."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from lamda import distributed
from lamda.config import Config
from lamda.distributed import World
from lamda.launch.pretrain import main
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.loggers import RunLogger, TrainingProgress
from lamda.training.setup import TrainingJob
from lamda.training.stop_requests import Attempt
from lamda.training.watchdog import HANG_EXIT
from tests.conftest import make_text, write_shard
from tests.wandb_run import environment, forgotten
from tests.wandb_server import WandbServer

KEY = {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online"}
SETTINGS = {
    "model.vocab_size": 400, "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 1, "model.d_head": 8,
    "model.d_ff": 16, "data.corpus": "standard_library", "data.sequence_length": 16,
    "train.steps": 9, "train.global_batch_size": 4, "train.micro_batch_size": 2, "train.max_skipped_steps": 2,
    "train.max_rollbacks": 1, "checkpoint.every": 2, "wandb.mode": "online", "run.threads": 1,
}  # fmt: skip
FAULTS = "commit.manifest:full:*:4,loss:nan:*:5,loss:nan:*:6"
"""Those of a step come again when the run, gone back, reaches it again; so the run goes back once, and then fails."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    with WandbServer() as server:
        for name, value in {**environment(tmp_path / "home"), **KEY, "WANDB_BASE_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        with forgotten():
            yield server


@pytest.fixture
def in_this_process(device, monkeypatch):
    """DeepSpeed keeps its groups for the life of a process; the log gets its handlers back."""
    monkeypatch.setattr(distributed, "stop", lambda: None)
    root = logging.getLogger("lamda")
    before, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = before, level


def test_each_kind_of_trouble_is_an_alert(tmp_path, tokenizer_path, server, in_this_process, monkeypatch, capfd):
    text = write_shard(tmp_path / "text.jsonl", [make_text(n, 200) for n in range(20)])
    text.write_bytes(b"{no document}\n" + text.read_bytes())
    own = {"data.files": text, "data.eval_files": text, "tokenizer.path": tokenizer_path, "run.dir": tmp_path / "run"}
    flags = [part for key, value in {**SETTINGS, **own}.items() for part in (f"--{key}", str(value))]
    monkeypatch.setenv("LAMDA_ALLOW_FAULTS", "1")
    monkeypatch.setenv("LAMDA_FAULT", FAULTS)
    assert main(["--config", "configs/tiny.yaml", *flags]) == 1, capfd.readouterr().err
    message = [(alert["title"], alert["text"]) for alert in server.alerts]
    titles = Counter(title for title, _ in message)
    assert titles.pop("checkpoint failed") in (1, 2), "a save may still be under way when the run goes back"
    assert titles == {"lines quarantined": 1, "step skipped": 2, "rolled back": 1, "run failed": 1}
    texts = dict(message)
    assert "text.jsonl, line 1 (" in texts["lines quarantined"]
    assert "checkpoint of step 4" in texts["checkpoint failed"]
    assert "step 5 skipped: its loss or gradient is not finite" in texts["step skipped"]
    assert "back to step-00000002" in texts["rolled back"]
    assert "train.max_rollbacks is 1" in texts["run failed"]
    (run,) = server.runs.values()
    assert run.exit_code == 1, "it looks failed there"


def test_a_hang_is_an_alert_and_sent_before_the_process_ends(tmp_path, server, caplog):
    config = Config(train={"steps": 9}, wandb={"mode": "online"})
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    progress = TrainingProgress(done=0, steps=9, visible=False)
    logger = RunLogger(config, directory, RunState(), progress, enabled=True)
    attempt = Attempt(directory, World())
    others = dict.fromkeys(("task", "framework", "open_benchmarks", "signals"))
    job = TrainingJob(config=config, world=World(), **others)
    job.directory, job.attempt, job.logger = directory, attempt, logger
    with caplog.at_level(logging.CRITICAL):
        job._report_hang("rank 1 is silent since step 4")
    assert [(alert["title"], alert["text"]) for alert in server.alerts] == [
        ("run hangs", "rank 1 is silent since step 4")
    ]
    (run,) = server.runs.values()
    assert run.exit_code == HANG_EXIT
    assert directory.read_status()["reason"] == "rank 1 is silent since step 4"
