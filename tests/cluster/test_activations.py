"""The closed forms of activations against the tensors that a real forward and backward pass keeps and makes."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lamda.cluster.memory import RECOMPUTE, TILE, WIDE_ROWS, MemorySetting, activations, recomputed_flops
from lamda.cluster.zero import Sharding
from lamda.config import ModelConfig
from lamda.model import LaMDA, decoder
from lamda.model.attention import sdpa
from lamda.model.counts import flops_per_token
from lamda.model.initialization import initialize_weights
from lamda.model.loss import ROWS, token_losses
from tests.cluster.storages import FusedNorm, Storages

B, L, V = 2, 256, 512


def again(block, x, view):
    return checkpoint(BLOCK, block, x, view, use_reentrant=False)


def feed_forward_again(block, x, view):
    x = x + block.attention(block.attention_norm(x), view)
    return x + checkpoint(lambda y: block.feed_forward(block.feed_forward_norm(y)), x, use_reentrant=False)


BLOCK = decoder.Block.forward
FORWARDS = {"none": BLOCK, "ffn": feed_forward_again, "block": again}


@pytest.fixture
def run(monkeypatch):
    """Builds a model, and the function that computes its loss with a kind of recomputation."""
    monkeypatch.setattr(functional, "rms_norm", lambda x, shape, scale, eps: FusedNorm.apply(x, scale, eps))

    def build(*, recompute="none", dtype=torch.bfloat16, documents=False, **keys):
        monkeypatch.setattr(decoder.Block, "forward", FORWARDS[recompute])
        model = LaMDA(ModelConfig(**{"preset": "tiny", "n_layers": 2, "vocab_size": V, **keys}))
        initialize_weights(model, seed=0)
        model.to(dtype)
        ids = torch.arange(B * L).view(B, L) % model.config.vocab_size

        def loss():
            nats, partition = token_losses(model(ids, ids // 100 if documents else None), ids)
            return (nats + 1e-4 * partition.square()).sum()

        return model, loss

    return build


def expected(model, *, recompute="none", dtype=torch.bfloat16, documents=False):
    width = dtype.itemsize
    sharding = Sharding(stage=0, ranks=1, weight=width, accumulated=width, sent=width)
    return activations(
        MemorySetting(model.config, model.attention, sharding, B, L, 1, recompute, has_documents=documents)
    )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_what_is_kept_in_fp32_is_what_autograd_saves(run, attention, documents):
    """On a CPU; `tests/model/test_fake_gpu.py` has bf16, and all backends."""
    dtype = torch.float32
    model, loss = run(attention=attention, dtype=dtype, documents=documents)
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    logits = B * L * V * dtype.itemsize
    kept = sum(storage.nbytes() for storage in saved.values()) - logits
    assert expected(model, dtype=dtype, documents=documents).kept == pytest.approx(kept, rel=0.002)


@pytest.mark.parametrize(
    ("attention", "recompute", "pieces"),
    [*((attention, recompute, V) for attention in ("math", "sdpa") for recompute in RECOMPUTE), ("math", "none", 8192)],
)
def test_the_peak_is_that_of_a_step(run, attention, recompute, pieces):
    model, loss = run(attention=attention, recompute=recompute, vocab_size=pieces)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    with Storages(known) as storages:
        loss().backward()
    found = expected(model, recompute=recompute)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    computing = model.embedding.weight.nbytes + max(sizes)
    most = found.kept + max(found.logits, found.block + computing)
    assert 0.98 < most / storages.peak < 1.15


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_flops_of_recomputation_are_those_that_pytorch_counts(run, recompute):
    model, loss = run(recompute=recompute, attention="math")
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    # PyTorch counts attention's two products whole, here and in what is computed again.
    attention = model.config.n_layers * 2 * L * model.config.n_heads * model.config.d_head
    whole = 3 * attention + (attention if recompute == "block" else 0)
    computed = flops_per_token(model.config, L) + recomputed_flops(model.config, length=L, recompute=recompute)
    assert computed + whole == pytest.approx(counter.get_total_flops() / (B * L), rel=1e-9)


def test_the_models_own_pieces_are_as_large_as_assumed_here():
    assert (WIDE_ROWS, TILE) == (ROWS, sdpa.TILE)
