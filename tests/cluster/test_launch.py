"""Which processes belong to a launch, and that all of them can be ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamda.cluster.processes import Launch

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(120)"]


@pytest.fixture
def stranger():
    """A process that no launch started."""
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def beat(run, process, *, age=0.0):
    file = run / "heartbeats" / "rank-00000.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid}))
    os.utime(file, (time.time() - age, time.time() - age))


def test_a_launch_ends_with_everything_that_it_started_whatever_group_that_is_in(tmp_path):
    child = f"import subprocess, sys; subprocess.Popen({SLEEP}, start_new_session=True)"
    launch = Launch([sys.executable, "-S", "-c", child], run=tmp_path)
    while launch.poll() is None:
        time.sleep(0.01)
    assert len(launch.living()) == 1
    launch.kill()
    assert launch.living() == set()


def test_a_command_that_hides_its_environment_is_killed_too_and_has_an_exit_code_at_once(tmp_path):
    launch = Launch(["env", "-i", *SLEEP], run=tmp_path)
    while launch.living():
        time.sleep(0.01)
    assert launch.poll() is None
    launch.kill()
    assert launch.poll() == -signal.SIGKILL


def test_a_number_that_by_now_is_another_processs_is_not_a_rank(tmp_path, stranger):
    """The stranger began after this launch, but also after its number was written down."""
    launch = Launch([sys.executable, "-S", "-c", ""], run=tmp_path)
    launch.kill()
    beat(tmp_path, stranger)
    assert launch.living() == {stranger.pid}
    beat(tmp_path, stranger, age=60)
    assert launch.living() == set()
    launch.kill()
    assert stranger.poll() is None  # and it lives on


def test_a_rank_that_has_ended_is_not_living_although_nobody_has_collected_it(tmp_path, stranger):
    launch = Launch([sys.executable, "-S", "-c", ""], run=tmp_path)
    beat(tmp_path, stranger)
    assert stranger.pid in launch.living()
    os.kill(stranger.pid, signal.SIGKILL)
    launch.kill()
    assert launch.living() == set()


def test_the_log_takes_what_the_command_says(tmp_path):
    say = "import sys; print('one'); sys.exit('two')"
    launch = Launch([sys.executable, "-S", "-c", say], run=tmp_path, log=tmp_path / "log")
    while launch.poll() is None:
        time.sleep(0.01)
    assert sorted((tmp_path / "log").read_text().split()) == ["one", "two"]


PROOF = """
import sys, time
from pathlib import Path
from lamda.cluster import resume_test
from lamda.cluster.processes import Launch
from lamda.cli import main
folder = Path(sys.argv[1])

def run(self, ranks, others):
    launch = Launch([sys.executable, "-S", "-c", "import time; time.sleep(120)"], run=folder)
    try:
        while not launch.living():  # a process that has not begun its program yet is nobody's
            time.sleep(0.01)
        (folder / "pids").write_text(" ".join(map(str, launch.living())))
        time.sleep(120)
    finally:
        launch.kill()

resume_test.ResumeTest.run = run
sys.exit(main(["prove-resume", "--ranks", "1", "--config", "configs/tiny.yaml", "--run.dir", str(folder / "mine")]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_proof_that_is_stopped_ends_what_it_has_started_and_leaves_nothing(tmp_path, number):
    proof = subprocess.Popen([sys.executable, "-c", PROOF, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text()):
        assert proof.poll() is None, proof.stderr.read()
        time.sleep(0.02)
    proof.send_signal(number)
    assert proof.wait(600) == 130
    proof.stderr.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split())
    assert list(tmp_path.glob("mine-proof-*")) == []
