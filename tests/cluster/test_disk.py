"""What a run is said to store, against what it stores."""

from hypothesis import given
from hypothesis import strategies as st

from lamda.cluster.estimates import SPAN_BYTES, block_bytes, checkpoint_bytes, checkpoints, is_streamed, text_bytes
from lamda.config import Config
from lamda.data import blocks
from tests.conftest import make_text, write_shard


def a_config(**sections):
    return Config.model_validate({"train": {"steps": 1}, **sections})


def test_a_checkpoint_holds_weights_and_the_optimizers_fp32_weights_and_moments():
    assert checkpoint_bytes(1000, width=2) == 14_000
    assert checkpoint_bytes(1000, width=4) == 16_000


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.none() | st.integers(1, 30))
def test_no_run_holds_more_checkpoints_than_that(steps, every, keep, keep_every):
    config = a_config(train={"steps": steps}, checkpoint={"every": every, "keep": keep, "keep_every": keep_every})
    there, most = [], 0
    for step in range(1, steps + 1):
        if step % every == 0 or step == steps:
            there.append(step)
            most = max(most, len(there))
            doomed = [old for old in there[:-keep] if keep_every is None or old % keep_every]
            there = [each for each in there if each not in doomed]
    message = checkpoints(config)
    assert most <= message <= most + (keep if keep_every else 0)
    assert message == most or keep_every


def test_ready_rows_hold_narrow_ids_and_a_span_a_row():
    assert blocks.SPAN.itemsize == SPAN_BYTES
    sections = {"data": {"sequence_length": 100}, "train": {"steps": 3, "global_batch_size": 8}}
    assert block_bytes(a_config(**sections)) == 24 * (101 * 2 + SPAN_BYTES)
    assert block_bytes(a_config(model={"vocab_size": 70_000}, **sections)) == 24 * (101 * 4 + SPAN_BYTES)


def test_the_text_is_that_of_the_files_here_or_not_known(tmp_path):
    size = sum(write_shard(tmp_path / f"{n}.jsonl.zst", [make_text(n, 50)]).stat().st_size for n in range(3))
    here = a_config(data={"files": str(tmp_path / "*.zst")})
    assert (text_bytes(here), is_streamed(here)) == (size, False)
    there = a_config(data={"files": "https://example.org/a.jsonl"})
    assert (text_bytes(there), is_streamed(there)) == (None, True)
