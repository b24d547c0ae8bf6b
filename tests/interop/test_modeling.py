"""transformers' model computes what LaMDA computes: whole, cached, padded, recomputed, adapted."""

from __future__ import annotations

import sys
from itertools import pairwise

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.inference.sampling import Sampling
from lamda.interop.huggingface import LamdaConfig, LamdaForCausalLM, LamdaModel
from lamda.interop.huggingface.tokenization import fast_tokenizer
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.model.loss import token_nll
from tests.generation import generate

CLOSE = {"rtol": 0, "atol": 1e-9}
"""In float64; what float32 rounds has a test of its own."""
V = 61
SHAPE = {"vocab_size": V, "d_model": 22, "n_layers": 3, "n_heads": 3, "d_head": 7, "d_ff": 31}
LENGTH = 150
"""More than the longest distance that has a bucket of its own."""


@pytest.fixture(params=[True, False], ids=["bias-per-layer", "bias-shared"], scope="module")
def ours(request) -> LaMDA:
    """The weights doubled, so that logits differ widely."""
    model = LaMDA(ModelConfig(**SHAPE, bias_per_layer=request.param)).double()
    initialize_weights(model, seed=7)
    model.load_weights({name: 2 * weight for name, weight in model.export_weights().items()})
    return model


@pytest.fixture
def theirs(ours) -> LamdaForCausalLM:
    model = LamdaForCausalLM(LamdaConfig(**ours.config.dimensions, dtype="float64")).double()
    model.model.load_state_dict(ours.export_weights())
    return model.eval()


@pytest.fixture
def ids_BL() -> torch.Tensor:
    return torch.randint(2, V, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_ours(ours, theirs, ids_BL, attention):
    theirs.set_attn_implementation(attention)
    torch.testing.assert_close(theirs(ids_BL).logits, ours(ids_BL), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_in_float32_are_ours_to_a_hundred_thousandth(ours, ids_BL, attention):
    mine = LaMDA(ours.config)
    initialize_weights(mine, seed=7)
    model = LamdaForCausalLM(LamdaConfig(**ours.config.dimensions, attn_implementation=attention)).eval()
    model.model.load_state_dict(mine.export_weights())
    torch.testing.assert_close(model(ids_BL).logits, mine(ids_BL), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_head_alone_makes_logits_of_the_last_hidden_states(theirs, ids_BL):
    """Trainers and engines that never make all logits at once multiply the two themselves."""
    x_BLD = theirs.model(ids_BL).last_hidden_state
    torch.testing.assert_close(functional.linear(x_BLD, theirs.lm_head.weight), theirs(ids_BL).logits, **CLOSE)


@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_gradients_are_ours(ours, theirs, ids_BL, recompute):
    nll_BL, _ = ours(ids_BL[:, :-1], targets_BL=ids_BL[:, 1:])
    ours.zero_grad()
    nll_BL.mean().backward()
    if recompute is not None:
        theirs.activation_checkpointing_enable({"use_reentrant": recompute})
        theirs.enable_input_require_grads()
    output = theirs.train()(ids_BL, labels=ids_BL, use_cache=False)
    torch.testing.assert_close(output.loss, nll_BL.mean(), check_dtype=False)  # theirs is in float32 always
    token_nll(output.logits[:, :-1], ids_BL[:, 1:]).mean().backward()
    found = dict(theirs.model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cached_steps_are_the_whole(theirs, ids_BL, kind):
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=theirs.config, max_cache_len=LENGTH + 5)
    cuts = [0, 1, 60, 61, 140, LENGTH]
    parts = [
        theirs(ids_BL[:, first:last], past_key_values=cache, use_cache=True).logits for first, last in pairwise(cuts)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs(ids_BL).logits, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_changes_nothing(theirs, ids_BL, attention):
    theirs.set_attn_implementation(attention)
    wanted = theirs(ids_BL[:1]).logits
    for left, right in ((9, 0), (0, 9)):
        padded = functional.pad(ids_BL[:1], (left, right), value=1)
        mask = functional.pad(torch.ones_like(ids_BL[:1]), (left, right))
        found = theirs(padded, attention_mask=mask).logits[:, left : left + LENGTH]
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(ours, theirs, ids_BL, attention):
    """Padding-free batches of transformers tell documents by positions that begin anew."""
    theirs.set_attn_implementation(attention)
    lengths = torch.tensor([60, 1, LENGTH - 61])
    positions_BL = torch.cat([torch.arange(length) for length in lengths])[None]
    documents_BL = torch.arange(3).repeat_interleave(lengths)[None]
    found = theirs(ids_BL[:1], position_ids=positions_BL, use_cache=False).logits
    torch.testing.assert_close(found, ours(ids_BL[:1], documents_BL), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_branches_of_a_row_are_as_far_from_their_trunk_as_alone(ours, theirs, ids_BL, attention):
    """A 4D mask lets two continuations share a beginning, as trees of proposed tokens do."""
    theirs.set_attn_implementation(attention)
    trunk, first, second = 80, 30, 40
    positions_L = torch.cat([torch.arange(trunk + first), trunk + torch.arange(second)])
    branch_L = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([trunk, first, second]))
    sees_LM = torch.ones(LENGTH, LENGTH).tril() * ((branch_L == branch_L[:, None]) | (branch_L == 0))
    mask = torch.zeros(1, 1, LENGTH, LENGTH).double().masked_fill(sees_LM == 0, -torch.inf)
    found = theirs(ids_BL[:1], attention_mask=mask, position_ids=positions_L[None]).logits[0]
    alone = torch.cat([ids_BL[:1, :trunk], ids_BL[:1, trunk + first :]], dim=1)
    torch.testing.assert_close(found[: trunk + first], ours(ids_BL[:1, : trunk + first])[0], **CLOSE)
    torch.testing.assert_close(found[trunk + first :], ours(alone)[0, trunk:], **CLOSE)


def padded_prompts() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, V, (length,), generator=draw).tolist() for length in (9, 1, 40)]
    ids = torch.tensor([[1] * (40 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (40 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return prompts, ids, mask


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_prompts_padded_on_the_left_continue_as_ours_do(ours, theirs, cache):
    prompts, ids, mask = padded_prompts()
    wanted = generate(ours, prompts, Sampling(max_new_tokens=12, temperature=0))
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    found = theirs.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None, **options
    )
    assert found[:, 40:].tolist() == wanted


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 9}], ids=["beams", "sampled"])
def test_cache_changes_no_other_way_of_generating(theirs, options):
    _, ids, mask = padded_prompts()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(
            theirs.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, use_cache=use_cache, **options
            ).tolist()
        )
    assert found[0] == found[1]


@torch.no_grad()
def test_what_was_proposed_in_vain_is_taken_back(theirs, ids_BL):
    """Assisted generation crops the cache."""
    cache = DynamicCache()
    theirs(ids_BL[:, :90], past_key_values=cache, use_cache=True)
    cache.crop(60 - 90)
    found = theirs(ids_BL[:, 60:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, theirs(ids_BL).logits[:, 60:], **CLOSE)


def test_files_hold_plain_names(ours, theirs, tmp_path, ids_BL):
    theirs.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == ours.export_weights().keys()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    for folder in ("whole", "parts"):
        for kind, wanted in ((AutoModelForCausalLM, LamdaForCausalLM), (AutoModel, LamdaModel)):
            loaded = kind.from_pretrained(tmp_path / folder)
            assert type(loaded) is wanted
            base = getattr(loaded, "model", loaded)
            for name, weight in ours.export_weights().items():
                assert torch.equal(base.get_parameter(name), weight), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert loaded.lm_head.weight is loaded.model.embedding.weight
    assert torch.equal(loaded(ids_BL).logits, theirs(ids_BL).logits)


def test_a_new_model_starts_as_ours_does(ours):
    torch.manual_seed(0)
    config = LamdaConfig(**{**ours.config.dimensions, "d_model": 64, "d_ff": 128})
    theirs, fresh = LamdaForCausalLM(config), LaMDA(config.dimensions)
    initialize_weights(fresh, seed=0)
    for name, weight in fresh.export_weights().items():
        found = theirs.model.get_parameter(name)
        torch.testing.assert_close(found.std(), weight.std(), rtol=0.25, atol=1e-6, msg=name)
        torch.testing.assert_close(found.square().mean(), weight.square().mean(), rtol=0.4, atol=0, msg=name)


def test_adapters_of_peft_start_learn_merge_and_come_back(theirs, ids_BL, tmp_path):
    before = theirs(ids_BL).logits.detach()
    matrices = ["query", "key", "value", "output", "gate", "up", "down"]
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=matrices))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * len(matrices) * SHAPE["n_layers"]
    torch.testing.assert_close(model(ids_BL).logits, before)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids_BL, labels=ids_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learned = model.eval()(ids_BL).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids_BL).logits, learned, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(ids_BL).logits, learned, rtol=0, atol=1e-4)


def test_an_adapter_of_peft_is_loaded_beside_its_model(theirs, ids_BL, tmp_path):
    theirs.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["query", "down"], init_lora_weights=False)
    model = peft.get_peft_model(theirs, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(loaded(ids_BL).logits, model(ids_BL).logits)


def test_pipeline_generates(theirs, tokenizer_path, tmp_path):
    config = theirs.config.to_dict() | {"vocab_size": 400}
    model = LamdaForCausalLM(LamdaConfig(**config)).eval()
    tokenizer: PreTrainedTokenizerFast = fast_tokenizer(tokenizer_path)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["the ship", "it was that one had"]
    together = run(prompts, do_sample=False, max_new_tokens=6, batch_size=2)
    for prompt, (found,) in zip(prompts, together, strict=True):
        (alone,) = run(prompt, do_sample=False, max_new_tokens=6)
        assert found["generated_text"] == alone["generated_text"]
        assert found["generated_text"].startswith(prompt)
    answered = run([{"role": "user", "content": "What is that?"}], do_sample=False, max_new_tokens=4)
    assert answered[0]["generated_text"][-1]["role"] == "assistant"


def test_without_transformers_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lamda.interop.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lamda-pytorch\[huggingface\]'"):
        __import__("lamda.interop.huggingface")
