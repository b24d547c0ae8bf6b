"""Any bit that turns over in a copy of the weights, or in the fp32 weights behind it, shows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamda.distributed import World, minority_ranks
from lamda.engines.deepspeed import weight_check
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.engines.deepspeed.fragments import fragments
from lamda.engines.deepspeed.weight_check import corrupted_ranks
from tests.distributed.engine_worker import batch, config


@pytest.mark.parametrize(("stage", "bf16"), [(0, True), (1, False), (1, True), (2, True)])
def test_a_turned_bit_in_a_copy_or_behind_it_is_found(tmp_path, device, stage, bf16):
    engine = DeepSpeedEngine(config({"stage": stage, "bf16": bf16}, tmp_path, 0), world=World(), device=device)
    engine.initialize_weights()
    engine.train_step(batch(0, World()), lr=1e-2)
    assert corrupted_ranks(engine.deepspeed) == []
    copy = list(engine.model.parameters())[-2].detach().view(-1)
    behind = next(iter(fragments(engine.deepspeed))).tensors["weight"].view(-1)
    for flat, bit in [(copy, 0), (copy, 8 * copy.element_size() - 2), (behind, 30)]:
        bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
        bits[7] ^= 1 << bit
        assert corrupted_ranks(engine.deepspeed) == [0]
        bits[7] ^= 1 << bit
        assert corrupted_ranks(engine.deepspeed) == []


@pytest.mark.parametrize(
    ("copies", "odd"), [([5], []), ([5, 5], []), ([5, 6], [0, 1]), ([5, 6, 5], [1]), ([6, 6, 7, 6], [2])]
)
def test_where_there_is_no_second_copy_the_ranks_vote(copies, odd):
    assert minority_ranks(copies) == odd


words = st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40)


@given(words, st.integers(0, 1 << 40), st.data())
def test_the_hash_adds_up_over_pieces_and_any_one_change_shows(bits, start, data):
    flat = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    whole = weight_check._hash(flat, start=start)
    cut = data.draw(st.integers(0, len(bits)))
    parts = weight_check._hash(flat[:cut], start=start) + weight_check._hash(flat[cut:], start=start + cut)
    assert parts == whole
    place = data.draw(st.integers(0, len(bits) - 1))
    other = data.draw(st.integers(-(2**15), 2**15 - 1).filter(lambda word: word != bits[place]))
    changed = torch.tensor([*bits[:place], other, *bits[place + 1 :]], dtype=torch.int16)
    assert weight_check._hash(changed.view(torch.bfloat16), start=start) != whole


def test_pieces_larger_than_a_chunk_hash_the_same(monkeypatch):
    flat = torch.randn(1000)
    whole = weight_check._hash(flat, start=3)
    monkeypatch.setattr(weight_check, "CHUNK", 7)
    assert weight_check._hash(flat, start=3) == whole
