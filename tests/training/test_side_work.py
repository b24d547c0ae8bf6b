"""Side work never ends the main work: each kind of it, under each failure, is a warning, once, and no more."""

import errno
import logging
import os
from contextlib import contextmanager, nullcontext

import pytest

from lamda.best_effort import BestEffort
from lamda.config.loading import load_config
from lamda.data.quarantine import BadLine, Quarantined, QuarantineFile
from lamda.distributed import World
from lamda.storage import commit
from lamda.storage.metrics import MetricsFile, read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.run_log import run_log
from lamda.training.loggers import Profile
from lamda.training.stop_requests import Signals, StopRequests
from lamda.training.wandb_logger import WandbMirror
from lamda.training.watchdog import Watchdog
from tests.conftest import full_disk

ENVIRONMENT = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE]


@pytest.mark.parametrize("number", ENVIRONMENT)
def test_what_the_environment_refuses_is_one_warning(caplog, number):
    effort = BestEffort("samples/ cannot be written")
    for _ in range(3):
        with effort:
            raise OSError(number, os.strerror(number))
    (record,) = caplog.records
    assert record.getMessage() == f"samples/ cannot be written ({os.strerror(number)}); training continues"
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_failure_of_the_environment_passes(error):
    with pytest.raises(type(error)), BestEffort("samples/ cannot be written"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_a_foreign_library_may_fail_in_any_way_and_not_stop_an_interrupt(caplog, error):
    effort = BestEffort("W&B has not got it", errors=Exception)
    with effort:
        raise ZeroDivisionError("first line\nsecond line")
    assert caplog.messages == ["W&B has not got it (ZeroDivisionError: first line); training continues"]
    with pytest.raises(type(error)), effort:
        raise error


def status(directory):
    directory.write_status("running", step=3)


def skipped(directory):
    directory.note_skipped((8, 16), step=3, reason="a spike")


def bad_lines(directory):
    file = QuarantineFile(directory.quarantine)
    for _ in range(2):
        file.add([Quarantined(0, BadLine("file, line 4", "not JSON", "x"))])


def log(directory):
    with run_log(directory.log, is_main=True):
        logging.getLogger("lamda.console").info("a line")


def trace(directory):
    profile = Profile((1, 2), directory.profile)
    profile.begin(1)
    profile.end(1)
    profile.write()


def heartbeats(directory):
    with Watchdog(directory.heartbeats, world=World(), seconds=600, report=print) as watchdog:
        watchdog.mark("fetch", step=1)


def stop_requests(directory):
    with Signals() as signals:
        requests = StopRequests(directory.stop, world=World(), margin=0, signals=signals)
        requests.clear()
        assert requests.reason() is None
        requests.clear()


def mirror(directory):
    config = load_config(["--train.steps", "1", "--wandb.mode", "offline"])
    started = WandbMirror(config, folder=directory.path, run_id=None, step=0)
    started.finish()


def rows(directory):
    with open_metrics(directory) as file:
        for step in (1, 2, 3):
            file.write({"step": step})


@contextmanager
def open_metrics(directory):
    """Rows are no side work: they wait. A run whose file cannot even be opened does not start."""
    directory.path.mkdir(exist_ok=True)
    with MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=0) as file:
        yield file


SIDE_WORK = {
    status: {"full", "no folder"},
    skipped: {"full", "no folder"},
    bad_lines: {"full", "no folder"},
    log: {"full", "no folder"},
    trace: {"full", "no folder"},
    heartbeats: {"full", "no folder"},
    stop_requests: {"no folder"},
    mirror: {"full", "no folder"},
    rows: {"full"},
}
"""What each does in a run, and where it then has something to warn of."""


@pytest.mark.parametrize("failure", ["full", "no folder", None])
@pytest.mark.parametrize("work", SIDE_WORK, ids=lambda work: work.__name__)
def test_side_work_is_a_warning_and_no_more(tmp_path, monkeypatch, caplog, work, failure):
    monkeypatch.setattr("lamda.training.wandb_logger.WandbMirror._work", lambda self: None)  # the library's own part
    place = tmp_path / "place"
    if failure == "no folder" and work is not rows:
        place.write_bytes(b"")  # whoever the tests run as, nothing can be made or found below a file
    else:
        place.mkdir()
    with full_disk() if failure == "full" else nullcontext():
        work(RunDirectory(place / "run" if failure == "no folder" and work is not rows else place))
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (failure in SIDE_WORK[work]), caplog.messages


def test_void_rows_continue_a_full_disk_too(tmp_path, caplog):
    directory = RunDirectory(tmp_path)
    with MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=0) as file:
        for step in (1, 2, 3):
            file.write({"step": step})
        with full_disk():
            file.rewind(1)
        file.write({"step": 2, "again": True})
    assert read_metrics(directory.metrics) == [{"step": 1}, {"step": 2, "again": True}]
    assert "metrics.discarded.jsonl cannot be written" in caplog.text


def test_an_old_checkpoint_that_cannot_be_deleted_spoils_no_new_one(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(commit, "remove", refuse)
    for step in (1, 2):
        temporary = tmp_path / f".step-{step:08d}.tmp"
        commit.make_fresh(temporary)
        commit.commit(temporary, tmp_path / f"step-{step:08d}", {"step": step, "files": {}}, keep=1)
    assert (tmp_path / "LATEST").read_text() == "step-00000002"
    assert "an old checkpoint cannot be deleted (Permission denied)" in caplog.text


def test_a_bad_line_is_reported_once_whoever_reads_it(tmp_path, capsys):
    quarantine = logging.getLogger("lamda.data.quarantine")
    with run_log(tmp_path / "train.log", is_main=True):
        for line in (3, 4, 3):
            quarantine.warning("lane 0: file, line %d quarantined: not JSON", line)
    message = [line.partition(" line ")[2] for line in capsys.readouterr().err.splitlines()]
    assert message == ["3 quarantined: not JSON", "4 quarantined: not JSON"]
    assert (tmp_path / "train.log").read_text("utf-8").count("quarantined") == 2


def test_a_librarys_handler_at_the_root_shows_nothing_twice(tmp_path, caplog, capsys):
    with run_log(tmp_path / "train.log", is_main=True):
        logging.getLogger("lamda.training").warning("said once")
    assert "said once" not in caplog.messages
    assert capsys.readouterr().err.count("said once") == 1
    logging.getLogger("lamda.training").warning("afterwards")
    assert "afterwards" in caplog.messages
