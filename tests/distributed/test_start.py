"""A rank starts within its share of the host's memory; `tests/long/test_big_start.py` does it with a billion."""

import json
from pathlib import Path

from tests.launch import run_ranks

WORKER = str(Path(__file__).with_name("start_worker.py"))
SMALL = {"vocab_size": 4000, "d_model": 512, "n_layers": 8, "n_heads": 8, "d_head": 64, "d_ff": 4096}


def test_a_rank_of_two_starts_within_its_share_of_memory(tmp_path):
    """61 M weights: a share is 486 MB, and all of them in fp32 beside it 243 MB more."""
    (tmp_path / "case.json").write_text(json.dumps({"model": SMALL, "sub_group_size": 4_000_000}))
    ranks = run_ranks([WORKER, str(tmp_path / "case.json"), str(tmp_path)], world_size=2)
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr[-2500:] for rank in ranks)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["start"] - found["before"] < 1.2 * found["share"]
