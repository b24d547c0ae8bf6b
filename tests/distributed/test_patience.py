"""A rank whose companions do not come says so and ends."""

import subprocess
import sys
import threading

from lamda.distributed import World, exit_after

WAITS = """
import time
from lamda.distributed import World, exit_after
with exit_after("for all ranks to come", World(rank=2, world_size=4), seconds=0.2):
    time.sleep(30)
"""


def test_a_rank_that_waits_in_vain_ends_and_says_where_it_looked(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ended = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("rank 2 of 4 (host ")
    assert "has waited 0.2 s for all ranks to come (rank 0 listens on 10.1.2.3:29500)" in ended.stderr


def test_a_rank_whose_companions_come_in_time_continues():
    before = threading.enumerate()
    with exit_after("for all ranks to come", World(), seconds=600):
        (timer,) = set(threading.enumerate()) - set(before)
    timer.join(60)
    assert not timer.is_alive(), "it is called off, and would else wait on"
