"""Weight-only int8 quantization: matrices in 8 bits, the rest in bf16. Half the memory and memory traffic of bf16.

    w[o, :] = scale[o] q[o, :]      q in -127..127, scale[o] = max |w[o, :]| / 127

Activations are not quantized. Rounding the weights changes the logits by about 1% (tests/inference/test_int8.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamda.model import LaMDA
from lamda.model.layers import Embedding, Linear


def to_int8(model: LaMDA) -> LaMDA:
    """Quantize the matrices and the embedding of a model in place, for inference only."""
    model.to(torch.bfloat16).requires_grad_(requires_grad=False)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, Int8Matrix(child.weight))
            elif isinstance(child, Embedding):
                setattr(module, name, Int8Embedding(child.weight))
    return model


class Int8Matrix(nn.Module):
    """A quantized matrix [outputs, inputs] with one scale per output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
        rounded = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The product with x [..., inputs]: [..., outputs].

        The CPU kernel is the same for any number of rows: another one for larger batches would round differently, and
        the text of a request would depend on the other requests in its batch.
        """
        if x_BLD.device.type == "cpu":
            rows = x_BLD.flatten(0, -2)
            return torch._weight_int8pack_mm(rows, self.weight, self.scale).unflatten(0, x_BLD.shape[:-1])
        return functional.linear(x_BLD, self.weight.to(x_BLD.dtype)) * self.scale


class Int8Embedding(Int8Matrix):
    """One quantized vector [D] per token, for both the input and the output projection."""

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """[B, L] to [B, L, D]."""
        return self.weight[tokens_BL].to(self.scale.dtype) * self.scale[tokens_BL, None]

    def logits(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, V]."""
        return super().forward(x_BLD)
