"""The modules of `benchmark.py learning`: LaMDA, other packages' models in its sizes, and nanochat's ideas.

Each function builds one from a configuration, whose seed its weights are drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.learning_nanochat import Nanochat
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights, slopes

STD = 0.02
"""The deviation of GPT-2's and Llama's matrices at the start."""


def lamda(config: Config) -> nn.Module:
    """The configuration's own model."""
    model = LaMDA(config.model, recompute=config.train.recompute)
    initialize_weights(model, seed=config.run.seed, base_width=config.train.base_width)
    return model


def llama(config: Config) -> nn.Module:
    """transformers' Llama; matrices that write to the residual stream start at 1/sqrt(2 layers) of the others."""
    model = config.model
    with _other_package(config.run.seed):
        from transformers import LlamaConfig, LlamaForCausalLM

        built = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.d_model,
                intermediate_size=model.d_ff,
                num_hidden_layers=model.n_layers,
                num_attention_heads=model.n_heads,
                head_dim=model.d_head,
                max_position_embeddings=config.data.sequence_length,
                initializer_range=STD,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * model.n_layers) ** -0.5)
    return built


def gpt2(config: Config) -> nn.Module:
    """transformers' GPT-2 as nanoGPT trains it (github.com/karpathy/nanoGPT): no dropout, biases kept at 0.

    Its heads share D among them, so the feed-forward layer gets the parameters that LaMDA's attention has beyond
    that. The library scales the residual outputs itself.
    """
    model = config.model
    D, heads = model.d_model, model.n_heads * model.d_head
    with _other_package(config.run.seed):
        from transformers import GPT2Config, GPT2LMHeadModel

        built = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=model.vocab_size,
                n_positions=config.data.sequence_length,
                n_embd=D,
                n_layer=model.n_layers,
                n_head=model.n_heads if D % model.d_head else D // model.d_head,
                n_inner=(4 * heads + 3 * model.d_ff - 4 * D) // 2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=STD,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    return built


def x_transformers(config: Config) -> nn.Module:
    """x-transformers' decoder with T5's relative position bias and a gated GELU, else as the library has it."""
    model = config.model
    with _other_package(config.run.seed):
        from x_transformers import Decoder, TransformerWrapper

        decoder = Decoder(
            dim=model.d_model,
            depth=model.n_layers,
            heads=model.n_heads,
            attn_dim_head=model.d_head,
            rel_pos_bias=True,
            ff_glu=True,
            ff_no_bias=True,
            ff_mult=(model.d_ff + 0.5) / model.d_model,  # the product is rounded down
        )
        length = config.data.sequence_length
        return TransformerWrapper(num_tokens=model.vocab_size, max_seq_len=length, attn_layers=decoder)


@torch.no_grad()
def restart_x_transformers(module: nn.Module) -> None:
    """LaMDA's start of the parts that this decoder has too: residual outputs by 1/sqrt(2N), a bias table of slopes."""
    residual = [weight for name, weight in module.named_parameters() if name.endswith(("to_out.weight", "ff.2.weight"))]
    for weight in residual:
        weight.mul_(len(residual) ** -0.5)
    bias: Any
    (bias,) = (part for part in module.modules() if hasattr(part, "relative_attention_bias"))
    slopes(bias.relative_attention_bias.weight).div_(bias.scale)


def nanochat(config: Config) -> nn.Module:
    """The decoder of `learning_nanochat`; its feed-forward layer has two matrices where LaMDA's has three."""
    model = config.model
    return Nanochat(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        d_head=model.d_head,
        d_ff=3 * model.d_ff // 2,
        length=config.data.sequence_length,
        seed=config.run.seed,
    )


@contextmanager
def _other_package(seed: int) -> Iterator[None]:
    """For a model of another package, which draws its weights from PyTorch's own generator.

    Raises UserError where that package is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        except ImportError as error:
            why = f"this model is another package's ({error}): pip install 'lamda-pytorch[benchmark]'"
            raise UserError(why) from error
