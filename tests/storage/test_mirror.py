"""Checkpoints reach the mirror in the background and come back from it bit for bit, and no failure of it ends a run."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from lamda.config.errors import UserError
from lamda.storage import manifest, mirror_thread
from lamda.storage import mirror as mirrors
from lamda.storage.mirror import Mirror, require_empty, restore_newer
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import RunDirectory
from tests.conftest import full_disk
from tests.launch import ROOT
from tests.s3 import s3_bucket
from tests.storage.copies import FILES, copies, save


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "one")
    directory.create()
    return directory


@pytest.fixture(params=["folder", "s3"])
def address(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "mirror")
    else:
        with s3_bucket() as bucket:
            yield bucket


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mirror" / "one"


@pytest.fixture(autouse=True)
def impatient(monkeypatch, caplog):
    monkeypatch.setattr(mirror_thread, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(mirror_thread, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(mirror_thread, "MAX_WAIT", 0.05)
    monkeypatch.setattr(mirror_thread, "END_SECONDS", 20.0)
    monkeypatch.setattr(mirror_thread, "OUTAGE_SECONDS", 0.3)
    caplog.set_level(logging.INFO, "lamda")


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lost(directory):
    """The same run directory on an empty disk."""
    shutil.rmtree(directory.path)
    directory.create()
    return directory


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def there(directory, address):
    return Mirror(address, directory.path).checkpoints()


def test_what_comes_back_is_what_was_saved(directory, address):
    with copies(directory, address, keep=2) as thread:
        for step in (2, 4, 6):
            newest = save(directory, step, keep=2)
            wait_for(lambda name=newest.name: thread.state["copied"] == name)
    before, rows = contents(newest), directory.metrics.read_text()
    assert there(directory, address) == {"step-00000004": True, "step-00000006": True}
    assert json.loads(directory.mirror.read_text())["problem"] is None
    mirror = Mirror(address, lost(directory).path)
    restore_newer(mirror, directory)
    assert contents(newest) == before
    assert manifest.problem_of(newest) is None
    assert (directory.checkpoints / "LATEST").read_text() == newest.name
    assert (directory.metrics.read_text(), directory.noted_checkpoint()) == (rows, 6)
    assert directory.tokenizer.read_bytes() == before["tokenizer.model"]


def test_the_next_start_copies_what_was_not(directory, folder):
    save(directory, 2)
    save(directory, 4)
    with copies(directory, str(folder.parent)):
        wait_for(lambda: len(there(directory, str(folder.parent))) == 2)
    assert there(directory, str(folder.parent))["step-00000004"]


def test_the_rules_of_the_run_directory_hold_on_the_mirror(directory, folder):
    address = str(folder.parent)
    with copies(directory, address, keep=1, keep_every=4) as thread:
        for step in (2, 4, 6, 8, 10):
            newest = save(directory, step)
            wait_for(lambda name=newest.name: thread.state["copied"] == name)
    assert list(there(directory, address)) == ["step-00000004", "step-00000008", "step-00000010"]


def test_a_torn_copy_is_never_used_and_goes_with_the_next(directory, address, caplog):
    save(directory, 2)
    torn = save(directory, 4)
    mirror = Mirror(address, directory.path)
    with copies(directory, address):
        wait_for(lambda: len(there(directory, address)) == 2)
    mirror._fs.rm_file(f"{mirror._root}/{torn.name}/manifest.json")
    restore_newer(mirror, lost(directory))
    assert [path.name for path in manifest.complete(directory.checkpoints)] == ["step-00000002"]
    assert any("not used, because copying was cut short: step-00000004" in message for message in caplog.messages)
    with copies(directory, address):
        save(directory, 6)
    assert there(directory, address) == {"step-00000002": True, "step-00000006": True}


def test_a_torn_copy_alone_is_a_run_that_has_not_begun(directory, folder):
    mirror = Mirror(str(folder.parent), directory.path)
    mirror.prepare()
    mirror._put(ROOT / "LICENSE", f"{mirror._root}/step-00000002/model.safetensors")
    restore_newer(mirror, directory)
    assert manifest.complete(directory.checkpoints) == []


@pytest.mark.parametrize("damage", ["changed", "short", "missing", "manifest", "outside", "other step"])
def test_a_damaged_copy_is_reported_and_the_one_before_it_used(directory, folder, caplog, damage):
    for step in (2, 4):
        save(directory, step)
    with copies(directory, str(folder.parent)):
        wait_for(lambda: len(there(directory, str(folder.parent))) == 2)
    newest = folder / "step-00000004"
    spoil(newest, damage)
    mirror = Mirror(str(folder.parent), directory.path)
    restore_newer(mirror, lost(directory))
    assert [path.name for path in manifest.complete(directory.checkpoints)] == ["step-00000002"]
    assert not list(directory.path.parent.rglob("escaped"))
    assert sum(f"{newest.name} is damaged: " in message for message in caplog.messages) == 1
    spoil(folder / "step-00000002", damage)
    with pytest.raises(UserError, match=r"every checkpoint is damaged .* does not start over"):
        restore_newer(mirror, lost(directory))


def spoil(checkpoint, damage):
    file = checkpoint / "model.safetensors"
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        (checkpoint / "manifest.json").write_text("{}")
    else:
        content = json.loads((checkpoint / "manifest.json").read_text())
        del content["sha256"]
        if damage == "outside":
            shutil.copy(file, checkpoint.parent / "escaped")
            content["files"]["../escaped"] = content["files"]["model.safetensors"]
        else:
            content["step"] += 1
        (checkpoint / "manifest.json").write_text(manifest.sealed(content))


def test_a_disk_that_is_behind_takes_the_newer_checkpoint(directory, tmp_path):
    """A job that moves between machines finds an old state of the run on a disk where it was before."""
    address = str(tmp_path / "mirror")
    save(directory, 2)
    shutil.copytree(directory.path, tmp_path / "other" / "one")
    with copies(directory, address):
        save(directory, 4)
    behind = RunDirectory(tmp_path / "other" / "one")
    restore_newer(Mirror(address, behind.path), behind)
    assert [path.name for path in manifest.complete(behind.checkpoints)] == ["step-00000002", "step-00000004"]
    assert behind.metrics.read_text() == directory.metrics.read_text()


@pytest.mark.parametrize("kind", ["start", "branch"])
def test_runs_of_one_name_neither_mix_nor_overwrite_each_other(directory, address, tmp_path, caplog, kind):
    directory.note_start({"time": 1.0})
    with copies(directory, address):
        save(directory, 8)
    other = RunDirectory(tmp_path / "elsewhere" / "one")
    other.create()
    if kind == "start":
        other.note_start({"time": 2.0})
    else:
        other.branch.write_text('{"run": "runs/one", "step": 2}\n')
    before = contents(save(other, 4).parent)
    with pytest.raises(UserError, match="holds the copies of another run; choose"):
        restore_newer(Mirror(address, other.path), other)
    with copies(other, address):
        pass
    assert there(directory, address) == {"step-00000008": True}
    assert contents(other.checkpoints) == before
    assert sum("holds the copies of another run" in message for message in caplog.messages) == 2


def test_a_run_that_has_lost_its_record_of_starts_keeps_its_mirror(directory, folder):
    directory.note_start({"time": 1.0})
    with copies(directory, str(folder.parent)):
        save(directory, 2)
    directory.starts.unlink()
    restore_newer(Mirror(str(folder.parent), directory.path), directory)
    directory.note_start({"time": 2.0})
    assert [json.loads(line)["time"] for line in directory.starts.read_text().splitlines()] == [1, 2]
    restore_newer(Mirror(str(folder.parent), directory.path), directory)


def test_a_torn_copy_gives_its_room_to_the_next_one(directory, folder, monkeypatch):
    """The mirror has room for two and a half."""
    put = LocalFileSystem.put_file

    def fail(self, source, target, **more):
        if not str(target).endswith("model.safetensors") and len([*folder.rglob("model.safetensors")]) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, source, target, **more)

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    save(directory, 2)
    with copies(directory, str(folder.parent), keep=1) as thread:
        wait_for(lambda: thread.state["copied"])
        (folder / "step-00000003").mkdir()
        (folder / "step-00000003" / "model.safetensors").touch()
        newest = save(directory, 4, keep=1, is_used=thread.is_copying)
        wait_for(lambda: thread.state["copied"] == newest.name)


def test_a_checkpoint_that_the_run_rolled_back_from_goes_and_does_not_come_back(directory, folder):
    save(directory, 2)
    bad = save(directory, 4)
    with copies(directory, str(folder.parent)):
        wait_for(lambda: all((folder / name / "manifest.json").exists() for name in (bad.name, "step-00000002")))
        bad.rename(bad.with_name(f"{bad.name}.spoilt"))
        restore_newer(Mirror(str(folder.parent), directory.path), directory)
        assert not bad.exists()
        wait_for(lambda: not (folder / bad.name).exists())
        save(directory, 4, salt="again")
    assert (folder / bad.name / "model.safetensors").read_bytes() == (bad / "model.safetensors").read_bytes()


@pytest.mark.parametrize("failure", [errno.EROFS, errno.ENOSPC, errno.EIO, "gone", "full"])
def test_a_failing_folder_is_reported_once_and_copies_go_on_when_it_is_back(
    directory, folder, monkeypatch, caplog, failure
):
    save(directory, 2)
    with copies(directory, str(folder.parent)) as thread:
        wait_for(lambda: thread.state["copied"])
        put = LocalFileSystem.put_file

        def fail(self, source, target, **more):
            if not isinstance(failure, int):
                return put(self, source, target, **more)
            raise OSError(failure, os.strerror(failure))

        monkeypatch.setattr(LocalFileSystem, "put_file", fail)
        if failure == "gone":
            shutil.move(folder, folder.with_name("elsewhere"))
        newest = save(directory, 4)
        if failure == "full":
            wait_for(lambda: thread.state["copied"] == newest.name)
            newest = save(directory, 6)  # its files are here before the disk is full
            with full_disk():
                wait_for(lambda: thread._failures > 2 or thread.state["copied"] == newest.name)
        else:
            wait_for(lambda: thread._failures > 2)
            assert json.loads(directory.mirror.read_text())["problem"]
            assert not folder.exists() or not there(directory, str(folder.parent)).get(newest.name)
        monkeypatch.setattr(LocalFileSystem, "put_file", put)
        if failure == "gone":
            shutil.move(folder.with_name("elsewhere"), folder)
        wait_for(lambda: thread.state["copied"] == newest.name and not thread._failures)
    warnings = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    assert len(warnings) <= 1 if failure == "full" else len(warnings) == 1
    assert json.loads(directory.mirror.read_text())["problem"] is None
    assert manifest.problem_of(folder / newest.name) is None


@pytest.fixture
def held(monkeypatch):
    """An event without which no file is copied."""
    go, put = threading.Event(), LocalFileSystem.put_file

    def wait(self, source, target, **more):
        assert go.wait(60)
        put(self, source, target, **more)

    monkeypatch.setattr(LocalFileSystem, "put_file", wait)
    yield go
    go.set()


def test_a_slow_mirror_holds_nothing_and_the_newest_wins(directory, folder, held, caplog):
    with copies(directory, str(folder.parent), keep=1) as thread:
        for step in (2, 4, 6, 8):
            newest = save(directory, step, keep=1, is_used=thread.is_copying)
            wait_for(lambda: thread._current is not None)
        names = [path.name for path in manifest.complete(directory.checkpoints)]
        assert names == ["step-00000002", "step-00000008"], "what is being copied stays"
        held.set()
    assert there(directory, str(folder.parent)) == {newest.name: True}
    copied = [message.split()[1] for message in caplog.messages if message.startswith("copied")]
    assert copied == ["step-00000002", "step-00000008"]


def test_a_checkpoint_that_is_deleted_before_its_turn_is_reported(directory, folder, monkeypatch, caplog):
    fail = pytest.MonkeyPatch.context
    with fail() as patch:
        patch.setattr(LocalFileSystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        with copies(directory, str(folder.parent), keep=1) as thread:
            save(directory, 2, keep=1)
            wait_for(lambda: thread._waiting)
            save(directory, 4, keep=1)
            wait_for(lambda: "step-00000004" in thread._waiting)
    assert any("step-00000002 was deleted before it was copied" in message for message in caplog.messages)
    assert any("step-00000004 is not on" in message for message in caplog.messages)


def test_the_end_waits_for_a_bounded_time(directory, folder, held, monkeypatch, caplog):
    monkeypatch.setattr(mirror_thread, "END_SECONDS", 0.3)
    began = time.monotonic()
    with copies(directory, str(folder.parent)) as thread:
        save(directory, 2)
        wait_for(lambda: thread._current is not None)
    assert time.monotonic() - began < 10
    assert "waiting for the copy of step-00000002" in caplog.text
    assert "step-00000002 is not on" in caplog.messages[-1]
    assert "not copied" in json.loads(directory.mirror.read_text())["problem"]


def test_a_failed_run_does_not_wait(directory, folder, held):
    began, thread = time.monotonic(), copies(directory, str(folder.parent))
    thread.__enter__()
    save(directory, 2)
    thread.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert time.monotonic() - began < 5


def test_a_process_that_has_lost_the_run_copies_nothing(directory, folder):
    class Lost:
        def require(self):
            raise mirror_thread.LostLockError("another process has taken over this run")

    with copies(directory, str(folder.parent), lock=Lost()) as thread:
        save(directory, 2)
        wait_for(lambda: not thread._thread.is_alive())
    assert there(directory, str(folder.parent)) == {}


@pytest.mark.parametrize("file", ["metrics.jsonl", FILES[0]])
def test_kill_9_during_a_copy_leaves_the_one_before_it(directory, folder, file):
    with copies(directory, str(folder.parent)):
        save(directory, 2)
    torn = folder / "step-00000004" / file if file in FILES else folder / file
    before = torn.stat().st_mtime_ns if torn.exists() else 0
    command = [sys.executable, "-m", "tests.storage.copies", str(directory.path), str(folder.parent), file]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: torn.exists() and torn.stat().st_mtime_ns > before and process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.copytree(directory.path, directory.path.with_name("kept") / "one")
    mirror = Mirror(str(folder.parent), directory.path)
    restore_newer(mirror, lost(directory))
    assert [path.name for path in manifest.complete(directory.checkpoints)] == ["step-00000002"]
    kept = RunDirectory(directory.path.with_name("kept") / "one")
    with copies(kept, str(folder.parent)):
        pass
    assert manifest.problem_of(folder / "step-00000004") is None


def test_an_empty_disk_and_a_mirror_that_does_not_answer_is_no_new_run(directory, folder, monkeypatch):
    def fail(self):
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setattr(Mirror, "checkpoints", fail)
    with pytest.raises(
        UnreadableError, match=r"cannot be used now \(No route to host\), and there is no checkpoint here"
    ):
        restore_newer(Mirror(str(folder.parent), directory.path), directory)


def test_a_new_run_whose_mirror_cannot_be_written_does_not_begin(directory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnreadableError, match="cannot be used now"):
        restore_newer(Mirror(str(tmp_path / "file" / "mirror"), directory.path), directory)


@pytest.mark.parametrize("kind", ["error", "silence", "broken off"])
def test_a_run_with_checkpoints_continues_without_its_mirror(directory, folder, monkeypatch, caplog, kind):
    with copies(directory, str(folder.parent)):
        save(directory, 2)
        save(directory, 4)
    shutil.rmtree(directory.checkpoints / "step-00000004")
    monkeypatch.setattr(mirrors, "LOOK_SECONDS", 0.1)
    if kind == "broken off":
        monkeypatch.setattr(Mirror, "_get", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken off")))
    else:
        answer = {"error": lambda self: 1 / 0, "silence": lambda self: time.sleep(1)}[kind]
        monkeypatch.setattr(Mirror, "checkpoints", answer)
    restore_newer(Mirror(str(folder.parent), directory.path), directory)
    assert [path.name for path in manifest.complete(directory.checkpoints)] == ["step-00000002"]
    assert "continuing with the checkpoints here" in caplog.messages[-1]


def test_a_run_that_begins_elsewhere_refuses_the_mirror_of_another(directory, folder):
    require_empty(Mirror(str(folder.parent), directory.path), directory)
    with copies(directory, str(folder.parent)):
        save(directory, 2)
    require_empty(Mirror(str(folder.parent), directory.path), directory)
    with pytest.raises(UserError, match="already holds a run"):
        require_empty(Mirror(str(folder.parent), directory.path), lost(directory))


@pytest.mark.parametrize(
    ("address", "message"),
    [("nowhere://bucket", "cannot be opened"), ("{run}/copies", "is inside run.dir"), ("{run}", "is inside run.dir")],
)
def test_an_address_that_cannot_work_is_refused(directory, address, message):
    with pytest.raises(UserError, match=message):
        Mirror(address.format(run=directory.path), directory.path)


def test_the_list_of_a_run_is_in_a_folder_of_its_name(directory, tmp_path):
    assert Mirror(f"{tmp_path}/m/", directory.path).address == f"{tmp_path}/m/one"
    assert Mirror(f"{tmp_path}/m", directory.path)._root == str(Path(tmp_path) / "m" / "one")
