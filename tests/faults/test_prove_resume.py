"""`lamda test-resume` from start to end: five real launches of a tiny run (about a minute)."""

import json

from lamda.cluster.resume_test import main
from tests.conftest import make_text, write_shard
from tests.launch import ENVIRONMENT

# Two micro-batches per step: with four, one rank and two add gradients in different orders, and the optimizer state may
# differ in its last digit (docs/reliability.md, Exactness).
SETTINGS = """
model: {vocab_size: 400, d_model: 32, n_layers: 2, n_heads: 2, d_head: 16, d_ff: 64}
train:
  {tokens: 100000, global_batch_size: 8, micro_batch_size: 4, lr: 1e-2, warmup_steps: 3}
eval: {every: 6}
"""


def test_a_killed_run_is_proved_to_end_as_an_unbroken_one(tmp_path, monkeypatch, capfd):
    for file in range(2):
        texts = [make_text(50 * file + n, 40 + 29 * n) for n in range(24)]
        write_shard(tmp_path / "text" / f"{file}.jsonl.zst", texts)
    (tmp_path / "run.yaml").write_text(
        f"{SETTINGS}\nrun: {{dir: {tmp_path}/runs/mine}}\n"
        f"data: {{corpus: standard_library, files: '{tmp_path}/text/*', sequence_length: 32}}\n"
    )
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    code = main(["--config", str(tmp_path / "run.yaml"), "--ranks", "2", "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err[-3000:] + out
    message = json.loads(out)
    assert message["exact"]
    assert message["kept"] is None
    assert [trial["ranks"] for trial in message["resumed"]] == [2, 1]
    for trial in message["resumed"]:
        assert trial["differences"] == dict.fromkeys(["loss", "samples", "weights", "optimizer state"])
        assert 0 < int(trial["went_on_from"].removeprefix("step-")) <= trial["killed_after"] < message["steps"] == 12
    assert "run 3 of 3: killed after step" in err
    assert list((tmp_path / "runs").iterdir()) == []
