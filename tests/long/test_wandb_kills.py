"""Ten kills, with outages in between, leave one W&B run with each step once (some two minutes; `make test-long`)."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import wandb

from lamda.storage.run_directory import RunDirectory
from tests.wandb_run import Run, environment, kill_and_resume
from tests.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path_factory):
    """W&B, a key for it, and nothing of this machine's."""
    with WandbServer() as server:
        for name, value in environment(tmp_path_factory.mktemp("home")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield server
        wandb.teardown()


def logs(folder):
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def steps_of(file):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in shown.splitlines()]
    return [record["history"]["item"]["_step"] for record in found if record["type"] == "history"]


class Outage:
    """The server fails for a while."""

    def __init__(self, server):
        self.server = server

    def __enter__(self):
        before = self.server.refused
        self.server.fail()
        while self.server.refused == before:
            time.sleep(0.02)

    def __exit__(self, *error):
        self.server.up()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("outages", [False, True])
def test_ten_kills_online(tmp_path, server, outages, seed):
    last = kill_and_resume(
        tmp_path,
        mode="online",
        kills=10,
        arrived=lambda: sum(map(server.rows, server.runs)),
        before_kill=Outage(server) if outages else nullcontext(),
        seed=seed,
    )
    (run,) = server.runs.values()
    assert run.steps == list(range(1, last + 1))
    assert bool(server.refused) == outages


def test_ten_kills_offline(tmp_path, server):
    last = kill_and_resume(
        tmp_path,
        mode="offline",
        kills=10,
        arrived=lambda: sum(file.stat().st_size // 3_000 for file in logs(tmp_path)),
    )
    assert [step for file in logs(tmp_path) for step in steps_of(file)] == list(range(1, last + 1))
    command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
    subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    (run,) = server.runs.values()
    assert run.steps == list(range(1, last + 1))


def test_stop_run_in_the_browser_asks_as_the_stop_file_does(tmp_path, server):
    server.stop = True
    with Run(tmp_path) as run:
        run.train(3)
        end = time.monotonic() + 60
        while not RunDirectory(tmp_path).stop.exists():
            assert time.monotonic() < end
            time.sleep(0.1)
