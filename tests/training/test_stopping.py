"""Every way of asking a run to stop is heard, by name; nothing else stops it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lamda.distributed import Launcher, World, read_world
from lamda.training.stopping import StopRequests


def requests(tmp_path, world=World(), *, margin=0.0, hurry=lambda: None):  # noqa: B008 - frozen
    return StopRequests(tmp_path / "STOP", world=world, margin=margin, hurry=hurry)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
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
    with requests(tmp_path, hurry=heard.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(5)


def test_the_stop_file_is_obeyed_by_rank_0_and_then_gone(tmp_path):
    with requests(tmp_path) as listening, requests(tmp_path, World(rank=1, size=2)) as other:
        (tmp_path / "STOP").touch()
        assert listening.reason() == "STOP was there"
        assert other.reason() is None, "the ranks agree by way of rank 0"
        other.obeyed()
        assert (tmp_path / "STOP").exists()
        listening.obeyed()
        assert not (tmp_path / "STOP").exists()


def test_a_stop_file_of_an_earlier_run_is_not_obeyed(tmp_path):
    (tmp_path / "STOP").touch()
    with requests(tmp_path) as listening:
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
    told = tmp_path / "told"
    child = CHILD.format(launched=launched).replace("range(500)", f"range({500 if launched else 30})")
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(told)!r}])"
    parent = f"import subprocess, sys, time; {start}; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline().split()[1] == "False"
        launcher.kill()
    for _ in range(1000):
        if told.exists() and told.read_text():
            break
        time.sleep(0.01)
    assert told.read_text() == ("gone" if launched else "there")


def test_a_run_without_launcher_belongs_to_nobody():
    assert not Launcher.of(World()).is_gone()
