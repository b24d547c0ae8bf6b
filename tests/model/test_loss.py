"""Cross-entropy and log-partition against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lamda.model import loss
from lamda.model.loss import head_losses, token_losses, token_nll
from tests.losses import cross_entropy


def reference(logits_BLV, targets_BL, weights_BL):
    wide = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    nll_BL = functional.cross_entropy(wide.flatten(0, 1), targets_BL.flatten(), reduction="none").view(targets_BL.shape)
    return (nll_BL * weights_BL).sum(), (wide.logsumexp(-1).square() * weights_BL).sum(), nll_BL


@pytest.mark.parametrize("rows", [3, 1000], ids=["cut in parts", "in one part"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_and_gradients_equal_pytorch(dtype, rows, monkeypatch):
    monkeypatch.setattr(loss, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    ours = (3 * torch.randn(2, 7, 41, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    targets_BL = torch.randint(41, (2, 7), generator=generator)
    weights_BL = torch.rand(2, 7, generator=generator, dtype=torch.float64).round()

    nats, squares = cross_entropy(ours, targets_BL, weights_BL)
    expected_nats, expected_squares, expected_BL = reference(theirs, targets_BL, weights_BL)
    (nats + 0.1 * squares).backward()
    (expected_nats + 0.1 * expected_squares).backward()

    tight = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(nats, expected_nats, **tight)
    torch.testing.assert_close(squares, expected_squares, **tight)
    torch.testing.assert_close(token_nll(ours, targets_BL), expected_BL, **tight)
    torch.testing.assert_close(ours.grad, theirs.grad, **({} if dtype == torch.bfloat16 else tight))


def test_without_weights_every_target_counts_once():
    logits_BLV = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    targets_BL = torch.arange(10).view(2, 5)
    nats, squares = cross_entropy(logits_BLV, targets_BL)
    torch.testing.assert_close((nats, squares), reference(logits_BLV, targets_BL, torch.ones(2, 5))[:2])


def test_bf16_logits_are_summed_in_fp32():
    logits_BLV = torch.zeros(1, 3000, 7, dtype=torch.bfloat16)
    nats, _ = cross_entropy(logits_BLV, torch.zeros(1, 3000, dtype=torch.long))
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(3000 * torch.tensor(7.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("rows", [3, 14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_without_whole_logits_are_those_of_logits(monkeypatch, dtype, rows):
    """14 rows, 3 or all at a time, with gradients of what the head reads and of its weights."""
    monkeypatch.setattr(loss, "HEAD_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    x_BLD, weight_VD = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 7, 5), (41, 5)))
    targets_BL = torch.randint(41, (2, 7), generator=generator)
    d_nats, d_partition = torch.randn(2, 2, 7, generator=generator).to(dtype)
    found = []
    for whole in (True, False):
        inputs = x_BLD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        losses = token_losses(inputs[0] @ inputs[1].T, targets_BL) if whole else head_losses(*inputs, targets_BL)
        weighted = (losses[0] * d_nats + losses[1] * d_partition).sum()
        found.append([*losses, *torch.autograd.grad(weighted, inputs)])
    for expected, each in zip(*found, strict=True):
        torch.testing.assert_close(each, expected, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-12)
