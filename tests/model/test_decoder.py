"""What the decoder may see, and in which precision."""

from __future__ import annotations

import pytest
import torch

from lamda.config import ModelConfig
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights


def test_a_token_changes_no_logits_before_it(model):
    tokens_BL = torch.randint(53, (2, 19), generator=torch.Generator().manual_seed(0))
    changed_BL = tokens_BL.clone()
    changed_BL[:, 11] = (tokens_BL[:, 11] + 1) % 53
    before, after = model(tokens_BL), model(changed_BL)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(dim=-1).all()


def test_no_gradient_crosses_a_document(model):
    tokens_BL = torch.randint(53, (1, 12), generator=torch.Generator().manual_seed(0))
    documents_BL = torch.tensor([[4, 4, 4, 9, 9, 9, 9, 4, 4, 1, 1, 1]])
    embedded = []

    def keep(_: object, __: object, x_BLD: torch.Tensor) -> None:
        x_BLD.retain_grad()
        embedded.append(x_BLD)

    model.embedding.register_forward_hook(keep)
    model(tokens_BL, documents_BL)[0, 8].square().sum().backward()
    reached = embedded[0].grad[0].abs().sum(dim=-1) > 0
    assert reached.tolist() == [True] * 3 + [False] * 4 + [True] * 2 + [False] * 3


def test_a_document_in_a_row_has_the_logits_that_it_has_alone(model):
    tokens_BL = torch.randint(53, (1, 12), generator=torch.Generator().manual_seed(0))
    together = model(tokens_BL, torch.tensor([[0] * 5 + [1] * 7]))
    torch.testing.assert_close(together[:, 5:], model(tokens_BL[:, 5:]), rtol=0, atol=1e-12)


def test_documents_with_a_cache_are_refused(model):
    with pytest.raises(ValueError, match="not both"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), cache=[])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_narrow_weights_give_nearly_the_logits_of_float64(dtype, tolerance):
    config = ModelConfig(vocab_size=97, d_model=64, n_layers=4, n_heads=4, d_head=16, d_ff=128)
    narrow, wide = LaMDA(config).to(dtype), LaMDA(config).double()
    initialize_weights(narrow, seed=3)
    wide.load_weights(narrow.export_weights())
    tokens_BL = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    logits_BLV, exact_BLV = narrow(tokens_BL), wide(tokens_BL)
    assert logits_BLV.dtype == dtype
    assert (logits_BLV - exact_BLV).norm() < tolerance * exact_BLV.norm()
