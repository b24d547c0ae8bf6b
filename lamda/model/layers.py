"""The basic layers of the decoder. Parameters start as NaN, so that one that is never filled is noticed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamda.config import ModelConfig
from lamda.model.weights import BUCKETS


class Linear(nn.Linear):
    """A matrix [outputs, inputs] without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Fill with NaN."""
        nn.init.constant_(self.weight, torch.nan)


class Embedding(nn.Embedding):
    """One vector [D] per token, for both the input and the output projection (tied)."""

    def reset_parameters(self) -> None:
        """Fill with NaN."""
        nn.init.constant_(self.weight, torch.nan)

    def logits(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, V]: the product with the vector of every token."""
        return functional.linear(x_BLD, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in fp32 or wider (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), torch.nan))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        return functional.rms_norm(x_BLD, self.scale.shape, self.scale, eps=1e-6)


def bias_table(config: ModelConfig) -> nn.Parameter:
    """T5 relative position bias [R, H]: added to the scores of a head, per bucket of distance."""
    return nn.Parameter(torch.full((BUCKETS, config.n_heads), torch.nan))
