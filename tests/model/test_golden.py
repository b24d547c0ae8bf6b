"""The model against an independent reference in float64."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from lamda.model import LaMDA
from tests.losses import cross_entropy


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_logits_losses_and_every_gradient_equal_the_reference(golden):
    model = LaMDA(golden.config).double()
    model.load_weights(golden.under("weights/"))
    tokens_BL, documents_BL = golden.tensors["tokens"], golden.tensors.get("documents")
    weights_BL = torch.ones_like(tokens_BL[:, 1:])
    if documents_BL is not None:
        weights_BL = (documents_BL[:, 1:] == documents_BL[:, :-1]).long()
        documents_BL = documents_BL[:, :-1]

    logits_BLV = model(tokens_BL[:, :-1], documents_BL)
    nats, squares = cross_entropy(logits_BLV, tokens_BL[:, 1:], weights_BL)
    loss, z_loss = nats / weights_BL.sum(), 1e-4 * squares / weights_BL.sum()
    (loss + z_loss).backward()

    close(logits_BLV, golden.tensors["logits"])
    close(loss, golden.tensors["loss"].squeeze())
    close(z_loss, golden.tensors["z_loss"].squeeze())
    expected = golden.under("gradients/")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])


def test_exported_weights_are_the_loaded_ones_by_plain_name(golden, tmp_path):
    model = LaMDA(golden.config).double()
    model.load_weights(golden.under("weights/"))
    save_file(model.export_weights(), tmp_path / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(exported, golden.under("weights/"), rtol=0, atol=0)
