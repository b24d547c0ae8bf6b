"""Every way of asking a run to stop is heard, by name; nothing else stops it."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from lamda.distributed import Launcher, World, read_world
from lamda.training.stop_requests import Signals, StopRequests


@contextmanager
def requests(tmp_path, world=World(), *, margin=0.0, react=lambda number: None):  # noqa: B008 - frozen
    with Signals() as signals:
        signals.call_on_signal(react)
        yield StopRequests(tmp_path / "STOP", world=world, margin=margin, signals=signals)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_and_does_not_end_the_process(tmp_path, name):
    before = signal.getsignal(getattr(signal, name))
    with requests(tmp_path) as listening:
        assert listening.reason() is None
        os.kill(os.getpid(), getattr(signal, name))
        assert listening.reason() == name
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_second_interrupt_ends_at_once(tmp_path):
    with requests(tmp_path) as listening:
        os.kill(os.getpid(), signal.SIGINT)
        assert listening.reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_heard_while_the_main_thread_is_deep_in_a_call(tmp_path):
    heard = threading.Event()
    with requests(tmp_path, react=lambda number: heard.set()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(60)


LEAVES = """
import os, signal, sys, threading
from lamda.training.stop_requests import Signals
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals() as signals:
    if sys.argv[2] == "report":
        signals.exit_on_signal(report=lambda name: print("told of", name, flush=True))
    if sys.argv[2] == "end":
        signals.exit_on_signal(exit_code=0)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    threading.Event().wait(0.5 if sys.argv[2] == "nohup" else 60)
    print("outlived it", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "how", "code", "said"),
    [
        ("SIGTERM", "start", 75, ""),
        ("SIGHUP", "start", 75, ""),
        ("SIGUSR1", "report", 75, "told of SIGUSR1\n"),
        ("SIGINT", "report", 130, "told of SIGINT\n"),
        ("SIGTERM", "end", 0, ""),
        ("SIGHUP", "nohup", 0, "outlived it\n"),
    ],
)
def test_before_the_first_step_and_after_the_last_save_a_signal_ends_the_process(name, how, code, said):
    done = subprocess.run([sys.executable, "-c", LEAVES, name, how], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_the_stop_file_is_obeyed_by_rank_0_and_then_gone(tmp_path):
    with requests(tmp_path) as listening, requests(tmp_path, World(rank=1, world_size=2)) as other:
        (tmp_path / "STOP").touch()
        assert listening.reason() == "STOP was there"
        assert other.reason() is None, "the ranks agree by way of rank 0"
        other.clear()
        assert (tmp_path / "STOP").exists()
        listening.clear()
        assert not (tmp_path / "STOP").exists()


def test_a_stop_file_of_an_earlier_run_is_not_obeyed(tmp_path):
    (tmp_path / "STOP").touch()
    with requests(tmp_path) as listening:
        listening.clear()
        assert listening.reason() is None
        assert not (tmp_path / "STOP").exists()


def test_the_schedulers_limit_is_obeyed_a_margin_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    with requests(tmp_path, read_world(), margin=60) as listening:
        assert listening.reason() is None
    with requests(tmp_path, read_world(), margin=200) as listening:
        assert listening.reason() == "the scheduler's time limit is near"


CHILD = """
import os, sys, time
from lamda.distributed import Launcher, World
launcher = Launcher.of(World(launched={launched}))
print(os.getpid(), launcher.is_gone(), flush=True)
for _ in range(500):
    if launcher.is_gone():
        open(sys.argv[1], "w").write("gone")
        break
    time.sleep(0.01)
else:
    open(sys.argv[1], "w").write("there")
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_vanishes_is_noticed_and_a_shell_may_go(tmp_path, launched):
    message = tmp_path / "told"
    child = CHILD.format(launched=launched).replace("range(500)", f"range({500 if launched else 30})")
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(message)!r}])"
    parent = f"import subprocess, sys, time; {start}; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline().split()[1] == "False"
        launcher.kill()
    for _ in range(1000):
        if message.exists() and message.read_text():
            break
        time.sleep(0.01)
    assert message.read_text() == ("gone" if launched else "there")


def test_a_run_without_launcher_belongs_to_nobody():
    assert not Launcher.of(World()).is_gone()
