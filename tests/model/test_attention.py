"""The relative position bias against T5's."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from lamda.model.attention.bias import causal_buckets, relative_bias

# Buckets of distances 0 to 130, worked out apart from the project.
LENGTHS = [3, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 10, 10, 12, 14, 18]
LISTED = [*range(16), *(16 + place for place, length in enumerate(LENGTHS) for _ in range(length))]


@pytest.fixture
def t5() -> T5Attention:
    torch.manual_seed(0)
    config = T5Config(d_model=12, d_kv=4, num_heads=3, is_decoder=True)
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    return attention.double().requires_grad_(False)


def test_buckets_are_the_listed_ones():
    assert len(LISTED) == 131
    assert causal_buckets(131).tolist() == LISTED


def test_buckets_equal_those_of_t5_far_beyond_the_last_one():
    distances = torch.arange(5001)
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional=False, num_buckets=32, max_distance=128)
    assert causal_buckets(5001).tolist() == theirs.tolist()


@pytest.mark.parametrize(("queries", "keys"), [(140, 140), (1, 140), (5, 137), (1, 1)])
def test_bias_equals_that_of_t5_and_hides_the_future(t5, queries, keys):
    theirs_HLM = t5.compute_bias(queries, keys, past_seen_tokens=keys - queries)[0]
    future_LM = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
    ours_HLM = relative_bias(t5.relative_attention_bias.weight, causal_buckets(keys), queries=queries)
    assert torch.equal(ours_HLM, theirs_HLM.masked_fill(future_LM, -torch.inf))


def test_bias_of_a_bf16_table_is_in_fp32():
    table_RH = torch.randn(32, 3, dtype=torch.bfloat16)
    bias_HLM = relative_bias(table_RH, causal_buckets(4), queries=4)
    assert bias_HLM.dtype == torch.float32
    assert torch.equal(bias_HLM[:, 3, 0], table_RH[3].float())
