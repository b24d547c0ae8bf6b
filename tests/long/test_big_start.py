"""A model of a billion weights starts under ZeRO stage 3 on two ranks, each within its share of the host's memory."""

import json
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_start import WORKER
from tests.launch import run_ranks

BILLION = {"vocab_size": 32000, "d_model": 1920, "n_layers": 8, "n_heads": 30, "d_head": 128, "d_ff": 15360}
NEEDED = 20 * 10**9


def test_a_billion_weights_start_within_the_share_of_each_of_two_ranks(tmp_path):
    if psutil.virtual_memory().available < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free memory")
    (tmp_path / "case.json").write_text(json.dumps({"model": BILLION, "sub_group_size": 20_000_000}))
    ranks = run_ranks([WORKER, str(tmp_path / "case.json"), str(tmp_path)], world_size=2, timeout=3600)
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr[-2500:] for rank in ranks)
    for rank in range(2):
        found = json.loads((Path(tmp_path) / f"{rank}.json").read_text())
        print(found)
        assert found["start"] < 1.2 * found["share"]
