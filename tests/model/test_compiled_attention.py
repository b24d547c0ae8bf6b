"""Every way of computing attention inside a compiled block: forward, backward, and evaluation beside it.

Graphs run as they are traced, without code made for them; tests/long/test_kernel_code.py has Inductor's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from lamda.config import ModelConfig
from lamda.engines.deepspeed import compile
from lamda.model import LaMDA, decoder
from lamda.model.attention import flex
from lamda.model.attention.bias import BAND
from lamda.model.initialization import initialize_weights
from tests.conftest import DEVICE
from tests.model.conftest import needs_kernels

CASES = [("sdpa", 9, True), ("fused", 9, True), ("flex", 9, False), ("split", BAND + 5, False)]
"""Way, length, documents; only `split` computes far keys in another way."""


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention without its refusals on a CPU, where its reference has a backward pass; and no code is made."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *_: None)
        monkeypatch.setattr(decoder, "choose_backend", lambda name, *_, **__: name)
        monkeypatch.setattr(flex, "_compiled", lambda: torch.compile(flex.flex_attention, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model_of(way: str) -> LaMDA:
    config = ModelConfig(vocab_size=53, d_model=32, n_layers=1, n_heads=2, d_head=16, d_ff=24, attention=way)
    model = LaMDA(config)
    initialize_weights(model, seed=7)
    return model.to(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)


def step(model: LaMDA, length: int, *, documents: bool) -> list[torch.Tensor]:
    tokens_BL = (torch.arange(length, device=DEVICE) % 53)[None]
    documents_BL = (torch.arange(length, device=DEVICE) // 4)[None] if documents else None
    logits_BLV = model(tokens_BL, documents_BL)
    if not torch.is_grad_enabled():
        return [logits_BLV]
    return [logits_BLV, *torch.autograd.grad(logits_BLV.float().sin().sum(), list(model.parameters()))]


@needs_kernels
@pytest.mark.parametrize(("way", "length", "documents"), CASES)
def test_a_compiled_block_gives_the_logits_and_gradients_of_math(way, length, documents, everywhere):
    model = model_of(way)
    for block in model.layers:
        block.compile(dynamic=False, backend="aot_eager")
    expected, found = (step(each, length, documents=documents) for each in (model_of("math"), model))
    bound = 2e-2 if DEVICE.type == "cuda" else 1e-5
    for exact, other in zip(expected, found, strict=True):
        assert (other - exact).float().norm() <= bound * exact.float().norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "the block is one graph"


def test_flex_stays_compiled_where_a_runs_blocks_are_not(everywhere):
    """Evaluation computes without the compiled blocks; uncompiled, FlexAttention would hold all scores."""
    model = model_of("flex")
    with torch.no_grad(), compile.force_eager(compiled=True):
        step(model, 9, documents=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
