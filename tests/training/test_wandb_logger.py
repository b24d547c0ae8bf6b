"""W&B mirrors metrics.jsonl under one id, each step once, and nothing that befalls it reaches the run.

The library is the real one; the server (tests/wandb_server.py) is on loopback.
"""

import builtins
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb

from lamda.config.loading import load_config
from lamda.storage.metrics import read_metrics
from lamda.training import wandb_logger
from lamda.training.wandb_logger import WandbMirror, mirror_mode
from tests.wandb_run import Run, environment, kill_and_resume, row
from tests.wandb_server import WandbServer

KEY, TOKEN, JWT = "canary0key0" * 4, "hf_canarytoken", "canaryjwt"
"""Secrets of the environment, which must not appear anywhere."""


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """No key, no settings of this machine, nobody to ask, and no server."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in environment(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)

    def ask(*prompt):
        raise AssertionError("a run must not ask")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr("getpass.getpass", ask)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    """W&B, and a key for it."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


@contextmanager
def limit(name):
    """A limit of the mirror's is one second instead of half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_logger, name, 1)
        yield


def said(caplog):
    """What the mirror itself logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("lamda")]


def logs(folder):
    """The transaction logs, one a start, in their order."""
    return sorted(folder.glob("wandb/*run-[0-9]*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def records(folder):
    """Everything in the transaction logs, read back with the library's own command."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    readers = [subprocess.Popen([*command, str(file)], stdout=subprocess.PIPE, text=True) for file in logs(folder)]
    found = [json.loads(line) for reader in readers for line in reader.communicate()[0].splitlines()]
    assert all(reader.returncode == 0 for reader in readers)
    return found


def stored(folder):
    """(id, step, loss) of every row in the logs, in the order of the starts."""
    found, run_id = [], None
    for record in records(folder):
        if record["type"] == "run":
            run_id = record["run"]["run_id"]
        if record["type"] == "history":
            item = record["history"]["item"]
            found.append((run_id, item["_step"], item["loss"]))
    return found


def rows(run, last):
    """What `stored` is for a whole run."""
    return [(run.mirror.run_id, step, 1 / step) for step in range(1, last + 1)]


def sync(folder):
    """`wandb sync RUN/wandb`, as the message says."""
    command = [sys.executable, "-m", "wandb", "sync", str(folder / "wandb")]
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stderr


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_starts_are_one_run_with_each_step_once(tmp_path, server, caplog):
    with Run(tmp_path) as first:
        first.train(3)
    with Run(tmp_path, step=2, run_id=first.mirror.run_id) as second:
        second.train(5)
    (run,) = server.runs.values()
    assert run.name == first.mirror.run_id == second.mirror.run_id
    assert run.steps == [1, 2, 3, 4, 5]
    shown = {key: value for key, value in run.history[3].items() if not key.startswith("_")}
    assert shown == {"step": 4, "loss": 0.25, "tokens": 400}, "neither null nor NaN"
    assert (run.project, run.exit_code) == ("p", 0)
    config = json.loads(run.config)
    assert (config["train"]["value"]["steps"], len(config["git_commit"]["value"])) == (9, 40)
    assert said(caplog) == []


def test_rows_that_w_and_b_lacks_are_replayed_from_the_file(tmp_path, server):
    with Run(tmp_path, mode="disabled") as unseen:
        unseen.train(4)
    with Run(tmp_path, step=4) as run:
        run.train(5)
    assert server.runs[run.mirror.run_id].steps == [1, 2, 3, 4, 5]


def test_steps_that_a_rollback_repeats_are_sent_once(tmp_path, server):
    with Run(tmp_path) as run:
        run.train(4)
        run.file.rewind(2)
        run.step = 2
        run.train(5)
    assert server.runs[run.mirror.run_id].steps == [1, 2, 3, 4, 5]


def test_offline_starts_within_a_second_hold_each_step_once_and_can_be_synced(tmp_path, server, caplog, capfd):
    for step, until in ((0, 3), (2, 5)):
        with Run(tmp_path, mode="offline", step=step) as run:
            run.train(until)
            run.mirror.checkpoint(tmp_path / "there is none, and none is asked for", best=False)
    assert "".join(capfd.readouterr()) == "", "the library says nothing"
    assert stored(tmp_path) == rows(run, 5)
    assert server.received == []
    sync(tmp_path)
    assert server.runs[run.mirror.run_id].steps == [1, 2, 3, 4, 5]
    assert said(caplog) == []


@pytest.mark.parametrize("damage", ["cut short", "rubbish"])
def test_a_log_that_is_not_whole_is_set_aside_and_its_rows_are_written_again(tmp_path, server, damage, caplog):
    with Run(tmp_path, mode="offline") as first:
        first.train(50)
    (file,) = logs(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"rubbish")
    with Run(tmp_path, mode="offline", step=50) as second:
        second.train(51)
    (message,) = said(caplog)
    assert message.startswith(f"{file} is set aside (")
    assert stored(tmp_path) == rows(second, 51)
    sync(tmp_path)
    assert server.runs[second.mirror.run_id].steps == list(range(1, 52))


def test_an_outage_at_the_start_goes_offline_and_the_next_start_sends_all(tmp_path, server, caplog):
    server.down()
    with limit("INIT_SECONDS"), Run(tmp_path) as first:
        first.train(3)
    assert stored(tmp_path) == rows(first, 3)
    (message,) = said(caplog)
    assert message.startswith("W&B is offline (CommError: ")
    assert message.endswith(f"the next start that reaches W&B sends them, or `wandb sync {tmp_path / 'wandb'}`")
    server.up()
    with Run(tmp_path, step=3) as second:
        second.train(4)
    assert second.mirror.run_id == first.mirror.run_id
    assert server.runs[first.mirror.run_id].steps == [1, 2, 3, 4]
    assert "No runs to sync" in sync(tmp_path), "what the second start sent is not sent again by hand"


def test_an_outage_in_the_middle_loses_no_row(tmp_path, server, caplog):
    with Run(tmp_path) as run:
        run.train(5)
        wait_for(lambda: server.rows(run.mirror.run_id) == 5)
        server.fail()
        run.train(10)
        wait_for(lambda: server.refused)
        server.up()
        run.train(15)
    assert server.runs[run.mirror.run_id].steps == list(range(1, 16))
    assert said(caplog) == []


def test_an_outage_to_the_end_and_at_the_next_start_ends_in_time_and_loses_no_row(tmp_path, server, caplog):
    with limit("UPLOAD_SECONDS"), Run(tmp_path) as first:
        first.train(5)
        wait_for(lambda: server.rows(first.mirror.run_id) == 5)
        server.down()
        first.train(10)
    with limit("INIT_SECONDS"), Run(tmp_path, step=10) as second:
        second.train(12)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    assert stored(tmp_path) == rows(first, 12)
    messages = said(caplog)
    assert [message.split("Error")[0] for message in messages] == ["W&B stopped (Timeout", "W&B is offline (Comm"]
    assert messages[0].endswith("the next start sends the rest")
    assert messages[1].endswith("the next start that reaches W&B sends them"), "`wandb sync` would leave a gap"
    server.up()
    with Run(tmp_path, step=12):
        pass
    assert server.runs[first.mirror.run_id].steps == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSTOP])
def test_the_librarys_process_may_die_or_hang(tmp_path, server, number, caplog):
    with limit("END_SECONDS"), Run(tmp_path) as run:
        run.train(3)
        wait_for(lambda: server.rows(run.mirror.run_id) == 3)
        os.kill(service(), number)
        run.train(6)
    assert len(said(caplog)) == 1
    with Run(tmp_path, step=6):
        pass
    assert server.runs[run.mirror.run_id].steps == [1, 2, 3, 4, 5, 6]


def service():
    """The process id of the library's own process."""
    command = ["pgrep", "--newest", "--parent", str(os.getpid()), "--exact", "wandb-core"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_caller_never_touches_the_library_and_never_waits(tmp_path, server, monkeypatch):
    threads, free = set(), threading.Event()
    real = wandb.init

    def slow(**asked):
        threads.add(threading.current_thread().name)
        assert free.wait(300)
        return real(**asked)

    monkeypatch.setattr(wandb, "init", slow)
    with Run(tmp_path) as run:
        for step in range(1, 1001):
            run.mirror.log(row(step))
        run.mirror.alert("title", "text")
        free.set()  # only now can the library start: whoever waited for it would wait in vain
    assert threads == {"wandb"}
    assert server.rows(run.mirror.run_id) == 1000
    assert [(alert["title"], alert["severity"]) for alert in server.alerts] == [("title", "WARN")]


def test_a_row_is_taken_as_it_is(tmp_path, server):
    with Run(tmp_path) as run:
        changing = row(1)
        run.mirror.log(changing)
        changing.update(loss=7.0)
    assert server.runs[run.mirror.run_id].history[0]["loss"] == 1.0


def test_no_key_goes_offline_asks_nobody_and_says_so_once(tmp_path, caplog, capfd):
    with Run(tmp_path) as run:
        run.train(2)
    assert "".join(capfd.readouterr()) == "", "the library says nothing"
    assert stored(tmp_path) == rows(run, 2)
    (message,) = said(caplog)
    assert "no W&B key: set WANDB_API_KEY, or run `wandb login`" in message
    assert f"`wandb sync {tmp_path / 'wandb'}`" in message


def test_a_key_of_wandb_login_is_found(tmp_path, server, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = Path(os.environ["NETRC"])
    netrc.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    with Run(tmp_path) as run:
        run.train(1)
    assert server.runs[run.mirror.run_id].steps == [1]


def test_disabled_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    threads = threading.active_count()
    with Run(tmp_path, mode="disabled", run_id="0badcafe") as run:
        assert threading.active_count() == threads
        run.train(1)
        run.mirror.alert("title", "text")
    assert run.mirror.run_id == "0badcafe"
    assert not (tmp_path / "wandb").exists()


def test_a_library_that_does_not_load_is_said_once_and_the_id_is_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_logger, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Run(tmp_path, run_id="0badcafe") as run:
        run.train(2)
    assert run.mirror.run_id == "0badcafe"
    (message,) = said(caplog)
    assert message.startswith("W&B stopped (ModuleNotFoundError")


def test_the_id_is_known_at_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(WandbMirror, "_work", lambda self: None)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    ids = [Run(folder).mirror.run_id for folder in (first, first, second)]
    assert ids[0] == ids[1] != ids[2]
    assert (first / "wandb" / "run-id").read_text() == ids[0]
    assert Run(first, run_id="0badcafe").mirror.run_id == "0badcafe"


def test_a_folder_that_cannot_be_written_does_not_reach_the_run(tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file in the way")
    with Run(tmp_path, mode="offline") as run:
        run.train(2)
    assert len(run.mirror.run_id) == 8
    assert "cannot be written" in said(caplog)[0]


def checkpoint(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    files = {"model.safetensors": {"size": 7 * step, "sha256": "0" * 64}}
    (path / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    return path


@pytest.mark.parametrize("way", ["reference", "upload"])
def test_checkpoints_become_artifacts_with_aliases(tmp_path, way, caplog):
    paths = [checkpoint(tmp_path, step) for step in (200, 400)]
    with Run(tmp_path, mode="offline", checkpoints=way) as run:
        run.mirror.checkpoint(paths[0], best=False)
        run.mirror.checkpoint(tmp_path / "pruned", best=False)
        run.mirror.checkpoint(paths[1], best=True)
        run.mirror.alert("loss spike", "went back to step 200")
        run.train(1)
    (message,) = said(caplog)
    assert "pruned" in message
    content = records(tmp_path)
    assert any(record["type"] == "history" for record in content), "a checkpoint that is gone stops no row"
    (alert,) = [record["alert"] for record in content if record["type"] == "alert"]
    assert (alert["title"], alert["text"], alert["level"]) == ("loss spike", "went back to step 200", "WARN")
    first, second = [record["artifact"] for record in content if record["type"] == "artifact"]
    assert {(each["name"], each["type"]) for each in (first, second)} == {(f"{run.mirror.run_id}-checkpoint", "model")}
    assert set(first["aliases"]) == {"latest", "step-00000200"}
    assert set(second["aliases"]) == {"latest", "step-00000400", "best"}
    metadata = json.loads(second["metadata"])
    assert (metadata["step"], metadata["files"]["model.safetensors"]["sha256"]) == (400, "0" * 64)
    entries = second["manifest"]["contents"]
    addresses = {entry["ref"] for entry in entries if entry.get("ref")}
    files = {Path(entry["local_path"]) for entry in entries if entry.get("local_path")}
    both = {paths[1] / "model.safetensors", paths[1] / "manifest.json"}
    if way == "reference":
        assert (addresses, files) == ({path.as_uri() for path in both}, {paths[1] / "manifest.json"})
    else:
        assert (addresses, files) == (set(), both)


def test_no_secret_reaches_w_and_b_or_the_run_folder(tmp_path, server, monkeypatch):
    for name, value in {"HF_TOKEN": TOKEN, "SLURM_JOB_ID": "7", "SLURM_JWT": JWT}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--secret", TOKEN])
    for mode, until in (("online", 3), ("offline", 4)):
        with Run(tmp_path, mode=mode, step=until - 1) as run:
            run.train(until)
    kept = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"main: starting server" in content for content in kept), "the library's own logs are among them"
    assert any(b"UpsertBucket" in request for request in server.received)
    for secret in (KEY, TOKEN, JWT):
        assert not [content for content in (*kept, *server.received) if secret.encode() in content]


def test_three_kills_online_leave_one_run_with_each_step_once(tmp_path, server):
    def arrived():
        return sum(map(server.rows, server.runs))

    last = kill_and_resume(tmp_path, mode="online", kills=3, arrived=arrived)
    (run,) = server.runs.values()
    assert run.steps == list(range(1, last + 1))


def test_a_run_without_the_package_says_so_once_and_continues(tmp_path, caplog):
    (tmp_path / "wandb").mkdir()  # of earlier runs, in the working directory; Python takes it for a package
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [str(tmp_path)])
        config = load_config(["--train.steps", "1", "--wandb.mode", "offline"])
        mirror = WandbMirror(config, folder=tmp_path / "run", run_id=None, step=0)
        mirror.log({"step": 1, "loss": 2.0})
        mirror.alert("title", "text")
        mirror.finish()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["W&B is not installed"]
    assert "pip install wandb" in caplog.text
    assert mirror.run_id is None


@pytest.mark.parametrize(("asked", "variable", "mode"), [
    ("online", None, "online"), ("online", "", "online"), ("online", "online", "online"), ("online", "run", "online"),
    ("online", "offline", "offline"), ("online", "dryrun", "offline"), ("online", "disabled", "disabled"),
    ("offline", "online", "offline"), ("offline", "disabled", "disabled"), ("disabled", "online", "disabled"),
    ("online", "Disabled", "disabled"), ("online", "nonsense", "disabled"),
])  # fmt: skip
def test_of_the_configuration_and_the_environment_the_one_that_sends_less_holds(monkeypatch, asked, variable, mode):
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert mirror_mode(load_config(["--train.steps", "1", "--wandb.mode", asked])) == mode


@pytest.mark.parametrize(("variable", "kept"), [("disabled", 0), ("offline", 1)])
def test_a_run_that_the_environment_keeps_from_the_server_sends_nothing(tmp_path, server, monkeypatch, variable, kept):
    monkeypatch.setenv("WANDB_MODE", variable)
    with Run(tmp_path, mode="online") as run:
        run.train(2)
    assert server.runs == {}
    assert server.received == []
    assert len(logs(tmp_path)) == kept
