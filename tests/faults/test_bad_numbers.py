"""Numbers that are not finite, in random places on random ranks: no rank ever updates from them.

60 at each of three ZeRO stages in `make faults`; 1,000 at each in `make faults-full`.
"""

import json
from pathlib import Path

from tests.faults.harness import IS_FULL
from tests.launch import run_ranks

WORKER = str(Path(__file__).with_name("nan_worker.py"))
STEPS = 1000 if IS_FULL else 60


def test_no_weight_and_no_moment_moves(tmp_path):
    first, second = run_ranks([WORKER, str(tmp_path), str(STEPS)], world_size=2, timeout=900)
    assert first.returncode == second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    message = json.loads(first.stdout.splitlines()[-1])
    expected = {"steps": STEPS, "updated": 0, "tensors_changed": 0, "then_updates": True}
    assert message == dict.fromkeys(("1", "2", "3"), expected)
