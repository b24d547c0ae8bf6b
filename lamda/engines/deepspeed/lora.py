"""LoRA (Hu et al., arXiv 2106.09685), `train.lora_rank`: the model is frozen; low-rank adapters of its matrices learn.

    y = W x + B A x      W [outputs, inputs] frozen, A [rank, inputs], B [outputs, rank]

B starts at zero, so the model starts unchanged. The paper's factor alpha / rank is 1: with AdamW it acts like a
learning rate. Each matrix of a block has its own pair.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamda.config.schema import Config
from lamda.model import LaMDA
from lamda.model.initialization import InitialWeight, generator
from lamda.model.layers import Linear
from lamda.model.weights import is_matrix, weight_shapes


class Adapted(nn.Module):
    """A frozen matrix [outputs, inputs] under its old name, and its adapter."""

    def __init__(self, weight: nn.Parameter, *, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.weight = weight.requires_grad_(False)  # noqa: FBT003 - torch's
        self.lora_a, self.lora_b = Linear(inputs, rank), Linear(rank, outputs)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The product with x [..., inputs]: [..., outputs]."""
        return functional.linear(x_BLD, self.weight) + self.lora_b(self.lora_a(x_BLD))

    def merged(self) -> Tensor:
        """The single matrix that computes the same: added in fp32, returned in the weight's precision."""
        product = self.lora_b.weight.detach().float() @ self.lora_a.weight.detach().float()
        return product.add_(self.weight).to(self.weight.dtype)


def adapt(model: LaMDA, *, rank: int) -> None:
    """Freeze the model and add an adapter to each of the blocks' matrices; its weights are not set yet."""
    model.requires_grad_(requires_grad=False)
    matrices = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    for name, matrix in matrices:
        model.set_submodule(name, Adapted(matrix.get_parameter("weight"), rank=rank))


def initial_adapters(config: Config) -> dict[str, InitialWeight]:
    """The adapters' weights by name: B is zero, and A's entries have the variance 1 / inputs.

    So A x is as large as x. The values depend only on the seed and their name, as those of
    `lamda.model.initialization`.
    """

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("lora_b.weight"):
            return torch.zeros(shape)
        own = generator(config.run.seed, name.removesuffix(".weight"))
        return torch.empty(shape).normal_(0.0, shape[1] ** -0.5, generator=own)

    shapes = {name: shape for name, shape in trained_shapes(config).items() if is_adapter(name)}
    return {name: InitialWeight(shape, partial(drawn, name, shape)) for name, shape in shapes.items()}


def merged(model: LaMDA, name: str) -> Tensor:
    """The parameter of that name, with its adapter merged in if it has one."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.merged() if isinstance(owner, Adapted) else model.get_parameter(name).detach()


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def trained_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """`weight_shapes` with the adapters' matrices."""
    shapes = weight_shapes(config.model)
    if config.train.lora_rank == 0:
        return shapes
    adapters = {}
    for name, shape in shapes.items():
        if is_matrix(name):
            outputs, inputs = shape
            stem = name.removesuffix("weight")
            adapters[f"{stem}lora_a.weight"] = (config.train.lora_rank, inputs)
            adapters[f"{stem}lora_b.weight"] = (outputs, config.train.lora_rank)
    return shapes | adapters
