"""A decoder and Muon by the ideas of nanochat (github.com/karpathy/nanochat), written for `benchmark.py learning`.

Rotary positions (Su et al., arXiv 2104.09864), normed queries and keys (Henry et al., arXiv 2010.04245), squared ReLU
(So et al., arXiv 2109.08668), RMS norms without learned scales, an untied head, outputs that start at 0, and a cap on
the logits. The head width is free here, where nanochat's is D / H. Dimensions: legend in `lamda/model/decoder.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamda.model.initialization import generator

CAP = 15.0
"""What the logits' absolute value stays below."""

ROTARY_BASE = 10_000.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, (x x^T) x and (x x^T)^2 x (Jordan et al., kellerjordan.github.io/posts/muon)."""
NEWTON_SCHULZ_STEPS = 5

ZEROED = ("output.weight", "down.weight", "head.weight")
"""Ends of the names of the matrices that start at 0, so that every block starts as the identity."""


class Nanochat(nn.Module):
    """Tokens to logits. length: L, the longest row."""

    rotation_2LK: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_head: int,
        d_ff: int,
        length: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            _Block(d_model=d_model, n_heads=n_heads, d_head=d_head, d_ff=d_ff) for _ in range(n_layers)
        )
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.register_buffer("rotation_2LK", _rotation(length, d_head), persistent=False)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Embedding 1; matrices 1/sqrt(inputs), less where outputs are fewer (Yang et al., arXiv 2310.17813)."""
        for name, weight in self.named_parameters():
            outputs, inputs = weight.shape
            std = 1.0 if name == "embedding.weight" else inputs**-0.5 * min(1.0, (outputs / inputs) ** 0.5)
            weight.normal_(0.0, 0.0 if name.endswith(ZEROED) else std, generator=generator(seed, f"nanochat.{name}"))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each token, in fp32."""
        x_BLD = _normed(self.embedding(tokens_BL))
        rotation_2LK = self.rotation_2LK[:, : tokens_BL.shape[1]]
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotation_2LK)
        return CAP * torch.tanh(self.head(_normed(x_BLD)).float() / CAP)


class _Block(nn.Module):
    """Attention, then the feed-forward layer, each on a normed copy of the residual stream."""

    def __init__(self, *, d_model: int, n_heads: int, d_head: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = (nn.Linear(d_model, n_heads * d_head, bias=False) for _ in range(3))
        self.output = nn.Linear(n_heads * d_head, d_model, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BLD: Tensor, rotation_2LK: Tensor) -> Tensor:
        """The residual stream [B, L, D] after this block."""
        x_BLD = x_BLD + self._attention(_normed(x_BLD), rotation_2LK)
        return x_BLD + self.down(functional.relu(self.up(_normed(x_BLD))).square())

    def _attention(self, x_BLD: Tensor, rotation_2LK: Tensor) -> Tensor:
        q_BHLK, k_BHLK, v_BHLK = (
            matrix(x_BLD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        q_BHLK, k_BHLK = (_normed(_rotated(each, rotation_2LK)) for each in (q_BHLK, k_BHLK))
        mixed_BHLK = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        return self.output(mixed_BHLK.transpose(1, 2).flatten(2))


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:])


def _rotation(length: int, d_head: int) -> Tensor:
    """Cosine and sine of each place's angle in each pair of a head's dimensions, [2, L, K/2]."""
    rates_K = ROTARY_BASE ** -(torch.arange(0, d_head, 2) / d_head)
    angles_LK = torch.arange(length)[:, None] * rates_K
    return torch.stack([angles_LK.cos(), angles_LK.sin()])


def _rotated(x_BHLK: Tensor, rotation_2LK: Tensor) -> Tensor:
    """Each pair of dimensions, one from either half of the head, turned by its place's angle; [B, H, L, K]."""
    first, second = x_BHLK.chunk(2, dim=-1)
    cosine, sine = rotation_2LK.to(x_BHLK.dtype)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon` computes, without decay, and in fp32 on a CPU without AVX512.

    That one is always in bf16, which took a CPU without such instructions four times a whole training step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix along its orthogonalized momentum, looked ahead by Nesterov's way."""
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                update = _orthogonal(gradient.lerp(state["momentum"], group["momentum"]))
                outputs, inputs = weight.shape
                weight.add_(update, alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The same singular vectors, all singular values near 1."""
    first, third, fifth = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x if x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" else x.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
