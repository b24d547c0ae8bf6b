"""A model in 8 bits beside itself in float32."""

from __future__ import annotations

import pytest
import torch

from lamda.config import ModelConfig
from lamda.inference.generation import prefill, sample
from lamda.inference.int8 import Int8Matrix, to_int8
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from tests.generation import generate


def make():
    model = LaMDA(ModelConfig(vocab_size=512, d_model=128, n_layers=4, n_heads=4, d_head=32, d_ff=512))
    initialize_weights(model, seed=1)
    return model.requires_grad_(False)


def size(model):
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("rows", [1, 8, 9], ids=str)
def test_a_matrix_is_within_half_a_step_of_its_scale(rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(torch.bfloat16)
    weight[5] = 0
    matrix = Int8Matrix(weight)
    restored = matrix.weight.float() * matrix.scale.float()[:, None]
    # The scale itself is rounded to bf16, 8 bits: the largest weight may be off by that and half a step.
    assert ((restored - weight.float()).abs() <= 1.01 * matrix.scale.float()[:, None]).all()
    x = torch.randn(rows, 64, generator=generator).to(torch.bfloat16)
    torch.testing.assert_close(matrix(x).float(), x.float() @ restored.T, rtol=0.01, atol=0.05)


@torch.no_grad()
def test_logits_are_within_three_percent_of_float32_in_half_the_memory_of_bf16():
    wide, narrow = make(), to_int8(make())
    tokens = torch.randint(512, (2, 50), generator=torch.Generator().manual_seed(0))
    exact, found = wide(tokens), narrow(tokens)
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert size(narrow) < 0.52 * size(make().to(torch.bfloat16))


def test_it_generates():
    model = to_int8(make())
    ids = sample(model, prefill(model, [1, 2, 3]), count=3, sampling=Sampling(max_new_tokens=5)).ids
    assert [len(each) for each in ids] == [5, 5, 5]


def test_the_number_of_candidates_changes_none_of_them():
    model = to_int8(make())
    prefix, sampling = prefill(model, [1, 2, 3]), Sampling(max_new_tokens=20, seed=1)
    sixteen, four = (sample(model, prefix, count=count, sampling=sampling).ids for count in (16, 4))
    assert sixteen[:4] == four
    assert len({tuple(ids) for ids in sixteen}) > 8


def test_company_changes_no_continuation():
    model = to_int8(make())
    sampling = Sampling(max_new_tokens=20, seed=1)
    prompts = [[1, 2, 3], [4] * 30, [5, 6]]
    alone = [generate(model, [prompt], sampling)[0] for prompt in prompts]
    assert generate(model, prompts, sampling) == alone
