"""fp8 is refused with everything that is missing, and where it runs only the products that it names change."""

import pytest
import torch

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.engines.deepspeed import fp8
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

SHAPE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 16}


def initialized(**sizes) -> LaMDA:
    model = LaMDA(ModelConfig(**SHAPE, **sizes))
    initialize_weights(model, seed=0)
    return model.bfloat16()


def test_everything_that_is_missing_is_reported_at_once(monkeypatch):
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        fp8.check(ModelConfig(**SHAPE, d_ff=36), torch.device("cpu"))
    assert str(caught.value) == (
        "train.fp8 needs a GPU of the Hopper class or newer (or Ada); the package torchao (pip install "
        "'lamda-pytorch[fp8]'); widths that are multiples of 16, not 36"
    )


def test_the_named_products_alone_change_and_losses_and_gradients_stay_near():
    pytest.importorskip("torchao")
    plain, converted = initialized(d_ff=64), initialized(d_ff=64)
    fp8.convert(converted, emulate=True)
    changed = [name for name, module in converted.named_modules() if type(module).__name__ == "Float8Linear"]
    assert len(changed) == 2 * 6
    assert {name.rpartition(".")[2] for name in changed} == set(fp8.PRODUCTS)
    ids_BL = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (plain, converted):
        nll_BL, _ = model(ids_BL[:, :-1], targets_BL=ids_BL[:, 1:])
        nll_BL.mean().backward()
        gradients.append((nll_BL.mean().item(), dict(model.named_parameters())))
    (loss, weights), (narrow_loss, narrow_weights) = gradients
    assert loss != narrow_loss, "something was computed in fp8"
    assert narrow_loss == pytest.approx(loss, rel=0.01)
    assert weights.keys() == narrow_weights.keys()
    for name, weight in weights.items():
        similar = torch.cosine_similarity(weight.grad.flatten(), narrow_weights[name].grad.flatten(), dim=0)
        assert similar > 0.97, name
    plain.load_weights(converted.export_weights())
