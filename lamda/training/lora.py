"""LoRA (Hu et al., arXiv 2106.09685), `train.lora_rank`: the model stays as it is, products beside its matrices learn.

    y = W x + B A x      W [outputs, inputs] frozen, A [rank, inputs], B [outputs, rank]

B starts at zero, and so the model as it was. The paper's factor alpha / rank is 1: beside AdamW it acts as a learning
rate does. What the module packs into one matrix (query, key and value; gate and up) shares one pair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamda.config.schema import Config
from lamda.model import LaMDA
from lamda.model.initialisation import generator
from lamda.model.layers import Linear
from lamda.model.weights import PlainSlice, part_of, plain_slices


class Adapted(nn.Module):
    """A frozen matrix [outputs, inputs], under the name that it had, and its adapter."""

    def __init__(self, weight: nn.Parameter, *, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.weight = weight.requires_grad_(requires_grad=False)
        self.lora_a, self.lora_b = Linear(inputs, rank), Linear(rank, outputs)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The product with x [..., inputs]: [..., outputs]."""
        return functional.linear(x_BLD, self.weight) + self.lora_b(self.lora_a(x_BLD))

    def merged(self) -> Tensor:
        """The one matrix that computes the same: added in fp32, in the weight's precision."""
        product = self.lora_b.weight.detach().float() @ self.lora_a.weight.detach().float()
        return product.add_(self.weight).to(self.weight.dtype)


@torch.no_grad()
def adapt(model: LaMDA, *, rank: int, seed: int) -> None:
    """Freeze the model and put an adapter beside each of the blocks' matrices.

    A's entries have the variance 1 / inputs, so that A x is as large as x; they depend on the seed and their name
    alone, as those of `lamda.model.initialisation`.
    """
    model.requires_grad_(requires_grad=False)
    matrices = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    for name, matrix in matrices:
        adapted = Adapted(matrix.weight, rank=rank)
        a, b = adapted.lora_a.weight, adapted.lora_b.weight
        a.copy_(torch.empty(a.shape).normal_(0.0, a.shape[1] ** -0.5, generator=generator(seed, f"{name}.lora_a")))
        b.zero_()
        model.set_submodule(name, adapted)


def merged(model: LaMDA, name: str) -> Tensor:
    """The parameter of that name; a matrix with its adapter, where it has one."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.merged() if isinstance(owner, Adapted) else model.get_parameter(name).detach()


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def slices(config: Config) -> dict[str, list[PlainSlice]]:
    """`plain_slices` of the model as a run trains it: with the adapters' matrices, which go by their own names."""
    found = plain_slices(config.model)
    if config.train.lora_rank == 0:
        return found
    adapters = {}
    for packed, plains in found.items():
        if part_of(packed) == "matrices":
            outputs, inputs = plains[0].shape
            shapes = {"a": (config.train.lora_rank, inputs), "b": (len(plains) * outputs, config.train.lora_rank)}
            for letter, shape in shapes.items():
                name = f"{packed.removesuffix('weight')}lora_{letter}.weight"
                adapters[name] = [PlainSlice(name, shape, 0)]
    return found | adapters
