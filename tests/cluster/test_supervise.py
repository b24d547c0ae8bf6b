"""What `lamda supervise` makes of commands that end in every way; the commands are small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from lamda.cluster.supervise import Supervisor, main
from lamda.config.errors import UserError
from lamda.storage.run_directory import RunDirectory

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path({run!r})
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
with (run / "starts").open("a") as starts:
    starts.write("x")
start = len((run / "starts").read_text())

def status(kind, **more):
    (run / "status.json").write_text(json.dumps({{"status": kind, "time": time.time(), **more}}))

def save(step):
    (run / "checkpoints" / "LATEST").write_text(f"step-{{step:08d}}")

def apart(code, **more):
    "A process in a session of its own, as a rank that has lost its launcher."
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **more).pid

def die(number):
    os.kill(os.getpid(), number)
    time.sleep(5)
"""
WAITS_FOR_STOP = """
for _ in range(200):
    if (run / "STOP").exists():
        break
    time.sleep(0.02)
else:
    sys.exit(1)
"""


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def command(run, code):
    return [sys.executable, "-S", "-c", PRELUDE.format(run=str(run.path)) + code]


def supervise(run, code, *, signals=(), orphan_seconds=0.2):
    return Supervisor(command(run, code), run, signals, pause=0.01, orphan_seconds=orphan_seconds).supervise()


def starts(run):
    return len((run.path / "starts").read_text())


def started(run):
    return (run.path / "status.json").exists()


@contextmanager
def signalled(run, *numbers):
    """Sends this process signals once the run says how it stands; yields those that nobody else noted."""
    noted = []

    def send():
        while not started(run):
            time.sleep(0.02)
        for number in numbers:
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    outside = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in numbers}
    before = [signal.getsignal(number) for number in numbers]
    sender = threading.Thread(target=send)
    sender.start()
    yield noted
    sender.join()
    assert [signal.getsignal(number) for number in numbers] == before
    for number, handler in outside.items():
        signal.signal(number, handler)


def test_a_failed_run_is_started_again_until_it_is_finished(run, capfd):
    code = """
if start == 1:
    status("running"); save(20); status("failed", reason="ValueError: bad\\nluck"); sys.exit(1)
if start == 2:
    status("running"); die(signal.SIGKILL)
status("finished", step=60)
"""
    assert supervise(run, code) == 0
    message = capfd.readouterr().out.splitlines()
    assert [line for line in message if "restart" in line] == [
        "supervise: restart 1 from step 20 in 0.01 s: ValueError: bad luck (exit code 1)",
        "supervise: restart 2 from step 20 in 0.02 s: ended without a reason, signal SIGKILL",
    ]
    assert message[-1] == "supervise: finished, 60 steps"


def test_three_restarts_without_a_newer_checkpoint_are_enough(run, capfd):
    code = """
save({1: 10, 2: 10, 3: 20, 4: 15}.get(start, 20)); status("failed", reason="disk"); sys.exit(1)
"""
    assert supervise(run, code) == 1
    # The first start and the third bring a newer one; three restarts after the third do not.
    assert starts(run) == 3 + 3
    message = capfd.readouterr().err
    assert all(word in message for word in ("gave up", "step 20", "disk", "train.log", "hang"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("status('preempted', step=7); sys.exit(75)", 75),
        ("status('preempted', step=7); sys.exit(143)", 75),
        ("sys.exit(75)", 75),
        ("status('failed', reason='a typo'); sys.exit(2)", 2),
        ("sys.exit(2)", 2),
        ("status('finished', step=7); die(signal.SIGABRT)", 0),
    ],
)
def test_what_is_not_a_failure_is_passed_on_and_not_started_again(run, code, expected):
    assert supervise(run, code) == expected
    assert starts(run) == 1


def test_it_says_that_a_refused_run_is_not_started_again(run, capfd):
    assert supervise(run, "status('failed', reason='data.files: no file matches'); sys.exit(2)") == 2
    said = capfd.readouterr().err
    assert "not restarted, it would fail again: data.files: no file matches (exit code 2)" in said


@pytest.mark.parametrize(
    "ending",
    [
        "status('running'); sys.exit(0)",
        "sys.exit(0)",
        "status('preempted', reason='the launcher is gone'); sys.exit(0)",
        "status('preempted', reason='the launcher is gone'); die(signal.SIGKILL)",
        "status('preempted', reason='SIGTERM before the first step: nothing has changed'); sys.exit(1)",
    ],
)
def test_a_launcher_that_was_killed_says_zero_or_ends_the_ranks_itself_is_not_believed(run, ending):
    code = f"""
if start == 1:
    {ending}
status("finished", step=3)
"""
    assert supervise(run, code) == 0
    assert starts(run) == 2


def test_the_word_of_an_earlier_start_does_not_count(run):
    """A run that was finished, is to go on to more steps, and dies before it begins."""
    run.create()
    run.write_status("finished", step=10)
    code = """
if start == 1:
    sys.exit(1)
status("finished", step=20)
"""
    assert supervise(run, code) == 0
    assert starts(run) == 2


def test_a_run_that_was_finished_before_is_finished(run):
    run.create()
    run.write_status("finished", step=10)
    assert supervise(run, "sys.exit(0)") == 0
    assert starts(run) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_when_asked_to_stop_it_waits_for_ranks_that_outlive_their_launcher(run, number):
    """The launcher dies of the signal; its rank, elsewhere, sees STOP, saves and says so."""
    rank = "import time" + PRELUDE.format(run=str(run.path)) + WAITS_FOR_STOP
    rank += "time.sleep(0.3); (run / 'STOP').unlink(); save(5); status('preempted', step=5, reason='STOP was there')"
    code = f"apart({rank!r}); status('running'); time.sleep(20)"
    with signalled(run, number):
        assert main(["--run", str(run.path), "--", *command(run, code)]) == 75
    assert run.read_status()["step"] == 5
    assert starts(run) == 2
    assert not run.stop.exists()


def test_ranks_that_are_known_are_asked_instead_of_their_launcher(run):
    """DeepSpeed's launcher would kill them after 30 s."""
    code = """
import socket
signal.signal(signal.SIGTERM, lambda *_: (run / "launcher-was-asked").touch())
rank = apart(
    "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    f"pathlib.Path({str(run / 'ready')!r}).touch(); time.sleep(20)"
)
while not (run / "ready").exists():
    time.sleep(0.01)
(run / "heartbeats").mkdir()
(run / "heartbeats" / "rank-00000.json").write_text(json.dumps({"host": socket.gethostname(), "pid": rank}))
status("running")
code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
status("preempted" if code == 75 else "failed", step=1)
sys.exit(code)
"""
    with signalled(run, signal.SIGTERM):
        assert main(["--run", str(run.path), "--", *command(run, code)]) == 75
    assert run.read_status()["status"] == "preempted"
    assert not (run.path / "launcher-was-asked").exists()


def test_a_stop_that_nobody_obeyed_is_taken_back(run, capfd):
    code = "status('running'); time.sleep(600); (run / 'slept').touch()"
    with signalled(run, signal.SIGTERM):
        assert main(["--run", str(run.path), "--", *command(run, code)]) == 75
    assert not (run.path / "slept").exists()
    assert "restart" not in capfd.readouterr().out
    assert not run.stop.exists()
    assert starts(run) == 1


def test_a_second_ctrl_c_kills(run):
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN); status('running'); time.sleep(600); (run / 'slept').touch()"
    with signalled(run, signal.SIGINT, signal.SIGINT):
        assert main(["--run", str(run.path), "--", *command(run, code)]) == 75
    assert not (run.path / "slept").exists()
    assert starts(run) == 1


def test_a_rank_may_take_its_time_to_save_when_it_was_asked(run):
    rank = PRELUDE.format(run=str(run.path)) + "time.sleep(0.8); status('preempted', step=5)"
    with signalled(run, signal.SIGTERM) as signals:
        code = f"apart({rank!r}); status('running'); signal.pause()"
        assert supervise(run, code, signals=signals, orphan_seconds=0) == 75
    assert run.read_status()["step"] == 5


def test_a_signal_during_the_pause_ends_the_waiting(run, capfd):
    supervisor = Supervisor(command(run, "sys.exit(1)"), run, signals := [], pause=600)
    timer = threading.Timer(0.5, signals.append, (signal.SIGTERM,))
    timer.start()
    assert supervisor.supervise() == 75
    timer.join()
    assert starts(run) == 1, "after its pause it would start again"
    assert "not restarted" in capfd.readouterr().out


def test_nothing_of_a_failed_run_is_left_when_it_starts_again(run):
    """Not a rank in a session of its own, nor one that only its heartbeat tells of."""
    code = """
if start == 1:
    import socket
    silent = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
    ranks = [apart(silent), apart(silent, env={"RANK": "1"})]
    (run / "heartbeats").mkdir()
    beat = json.dumps({"host": socket.gethostname(), "pid": ranks[1]})
    (run / "heartbeats" / "rank-00001.json").write_text(beat)
    (run / "ranks").write_text(" ".join(map(str, ranks)))
    sys.exit(1)
def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"
(run / "states").write_text(" ".join(state(int(pid)) for pid in (run / "ranks").read_text().split()))
status("finished", step=1)
"""
    assert supervise(run, code) == 0
    assert set((run.path / "states").read_text().split()) <= {"gone", "Z"}


def test_ranks_that_lost_their_launcher_may_save_first(run):
    rank = PRELUDE.format(run=str(run.path)) + "time.sleep(0.4); save(9); status('preempted', step=9, reason='gone')"
    code = f"""
if start == 1:
    status('running'); apart({rank!r}); die(signal.SIGKILL)
(run / "latest").write_text((run / "checkpoints" / "LATEST").read_text())
status('finished', step=10)
"""
    assert supervise(run, code, orphan_seconds=5) == 0
    assert (run.path / "latest").read_text() == "step-00000009"


def test_processes_of_another_run_in_the_same_folder_are_left_alone(run):
    """A second supervisor for one run, whose command fails while the first one's ranks hold the lock."""
    run.create()
    with run.lock() as held:
        other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(30)"])
        lock = held.path
        lock.write_text(lock.read_text().replace(str(os.getpid()), str(other.pid)))
        time.sleep(1.2)
        try:
            assert supervise(run, "status('finished', step=1) if start > 1 else sys.exit(1)") == 0
            assert other.poll() is None
        finally:
            other.kill()
            other.wait()


def test_it_waits_for_a_rank_zero_on_another_machine(run, capfd):
    """Whose lock would refuse the next start, as a user's mistake."""
    run.create()
    lock = run.path / "lock.json"
    lock.write_text('{"host": "elsewhere", "pid": 1}')
    timer = threading.Timer(0.7, lock.unlink)
    timer.start()
    code = """
if start == 1:
    sys.exit(1)
status("failed" if (run / "lock.json").exists() else "finished", step=1)
"""
    assert supervise(run, code) == 0
    timer.join()
    assert "waiting for rank 0 on elsewhere" in capfd.readouterr().out


def test_the_run_directory_is_known_from_the_commands_own_flags(run):
    flags = ["--num_gpus", "1", "--config", "configs/tiny.yaml", "--run.dir", str(run.path), "--train.steps=9"]
    assert main(["--", *command(run, "status('finished', step=9)"), *flags]) == 0
    assert starts(run) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "after --"),
        (["--"], "after --"),
        (["--", "python", "train.py"], "--run DIR"),
        (["--", "python", "train.py", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--run", "run", "--", "/no/such/program"], "cannot be started"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
