"""One living writer per run directory, whatever processes, containers, hosts and clocks do."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from lamda.config.errors import UserError
from lamda.storage import lock
from lamda.storage.lock import STALE_SECONDS, LostLockError, Owner, RunLock, living_owner, owners
from tests.storage.races import RACERS, race

OURS = (socket.gethostname(), os.getpid())
HOLD = """
import sys
from pathlib import Path
from lamda.storage.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def holder(tmp_path):
    """A process that is the writer until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def leave_lock(run, *, age=0.0, name="lock-other.json", **fields):
    """The file of a writer, as it was `age` seconds after its last beat."""
    path = run / name
    known = {"id": "other", "host": OURS[0], "boot": lock._boot(), "namespace": lock._namespace(), "has_flock": True}
    path.write_text(json.dumps({**known, **fields}) + '\n{"holds": true}\n')
    os.utime(path, (time.time() - age,) * 2)
    return path


def names(run):
    return sorted(path.name for path in run.iterdir())


def change(path, **fields):
    """Let a living owner's file say something else, in place: its flock stays."""
    lines = path.read_text().split("\n")
    content = "\n".join([json.dumps({**json.loads(lines[0]), **fields}), *lines[1:]])
    with path.open("r+") as stream:
        stream.truncate()
        stream.write(content)


def test_the_lock_names_its_owner_and_goes_at_the_end(tmp_path):
    with RunLock(tmp_path) as held:
        (owner,) = owners(tmp_path)
        assert (owner.path, owner.host, owner.pid, owner.holds) == (held.path, *OURS, True)
        assert living_owner(tmp_path) == owner
        assert held.is_mine()
    assert names(tmp_path) == []


def test_the_lock_goes_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "said",
    [{}, {"namespace": "pid:[1]", "pid": 1}, {"host": "elsewhere", "boot": "another"}, {"pid": 2**22 + 1}],
    ids=["plainly", "in-another-container", "on-another-host", "under-a-number-that-is-gone"],
)
@pytest.mark.parametrize("age", [0.0, STALE_SECONDS + 60.0])
def test_who_holds_it_is_refused_to_others_however_busy_it_is(tmp_path, holder, said, age):
    (owner,) = owners(tmp_path)
    change(owner.path, **said)
    os.utime(owner.path, (time.time() - age,) * 2)
    assert living_owner(tmp_path)
    with pytest.raises(UserError, match=rf"another process writes here .*choose another .*remove {owner.path}"):
        RunLock(tmp_path).__enter__()
    assert names(tmp_path) == [owner.path.name]


def test_a_killed_writer_is_replaced_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert len(owners(tmp_path)) == 1
    assert living_owner(tmp_path) is None
    with RunLock(tmp_path) as held:
        assert names(tmp_path) == [held.path.name]


@pytest.mark.parametrize(
    ("fields", "lives"),
    [
        ({"pid": os.getppid()}, False),  # its flock is free: the number is another process's by now
        ({"pid": os.getppid(), "has_flock": False}, True),
        ({"pid": os.getppid(), "has_flock": False, "started": 1}, False),  # the number was used again
        ({"pid": os.getpid(), "has_flock": False, "started": 1}, False),  # as in a container that was restarted
        ({"pid": 1, "namespace": "pid:[1]"}, False),
        ({"pid": 1, "namespace": "pid:[1]", "has_flock": False}, True),
        ({"pid": 1, "namespace": "pid:[1]", "has_flock": False, "age": STALE_SECONDS + 60}, False),
        ({"pid": 1, "boot": "another"}, True),
        ({"pid": 1, "boot": "another", "age": STALE_SECONDS + 60}, False),
        ({"pid": 1, "host": "elsewhere", "boot": "another", "age": STALE_SECONDS / 2}, True),
        ({"pid": 1, "host": "elsewhere", "boot": "another", "age": STALE_SECONDS + 60}, False),
        ({"pid": 1, "host": "elsewhere", "boot": "another", "age": -86400}, False),
        ({"pid": os.getppid(), "name": "lock.json", "boot": None, "namespace": None, "has_flock": None}, True),
    ],
)
def test_who_lives_is_the_same_to_a_start_and_to_a_reader(tmp_path, monkeypatch, fields, lives):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.05)
    path = leave_lock(tmp_path, **fields)
    assert (living_owner(tmp_path) is not None) is lives
    if lives:
        with pytest.raises(UserError, match=f"process {fields['pid']}"):
            RunLock(tmp_path).__enter__()
        assert names(tmp_path) == [path.name]
    else:
        with RunLock(tmp_path) as held:
            assert names(tmp_path) == [held.path.name]


@pytest.mark.parametrize("age", [-86400 * 365, STALE_SECONDS + 60])
def test_a_beat_that_continues_while_it_is_watched_is_heeded_whatever_the_clock_says(tmp_path, monkeypatch, age):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
    path = leave_lock(tmp_path, pid=1, host="elsewhere", boot="another", age=age)
    beats = threading.Timer(0.2, os.utime, (path, (time.time() - age + 5,) * 2))
    beats.start()
    with pytest.raises(UserError, match="host elsewhere"):
        RunLock(tmp_path).__enter__()
    beats.join()
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": "els', '{"host": 3, "pid": "x"}', "[" * 9999, "\0" * 64])
@pytest.mark.parametrize("name", ["lock.json", "lock-other.json"])
def test_what_is_no_lock_is_nobodys(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    with RunLock(tmp_path) as held:
        assert names(tmp_path) == [held.path.name]


def test_a_writer_whose_file_is_gone_knows_it_and_leaves_the_other_ones(tmp_path):
    with RunLock(tmp_path) as first:
        first.require()
        first.path.unlink()
        with RunLock(tmp_path) as second:
            assert not first.is_mine()
            with pytest.raises(LostLockError, match="another process has taken over"):
                first.require()
            first.__exit__(None, None, None)
            assert second.is_mine()


def test_the_beat_continues_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    beat, calls = os.utime, []

    def fail_at_first(path, *times):
        calls.append(path)
        if len(calls) == 1:
            raise OSError("stale file handle")
        beat(path, *times)

    with RunLock(tmp_path) as held:
        monkeypatch.setattr(os, "utime", fail_at_first)
        beat(held.path, (0, 0))
        limit = time.monotonic() + 60
        while held.path.stat().st_mtime == 0 and time.monotonic() < limit:
            time.sleep(0.01)
        assert Owner.read(held.path).age() < STALE_SECONDS


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left on device\)"):
        RunLock(tmp_path).__enter__()
    assert names(tmp_path) == []


def test_without_flock_the_number_and_the_beat_decide(tmp_path, monkeypatch, holder, dead_process):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    with RunLock(tmp_path) as held:
        assert not owners(tmp_path)[0].has_flock
        assert held.is_mine()


@pytest.mark.parametrize("kind", ["flock", "beat"])
def test_of_processes_that_start_together_one_writes(tmp_path, kind):
    """Some rounds of what `make faults` does a thousand times."""
    counts = race(tmp_path, kind=kind, rounds=15)
    assert all(1 <= count <= RACERS for count in counts)
