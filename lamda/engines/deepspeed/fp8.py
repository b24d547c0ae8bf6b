"""fp8 for the products with the most FLOPs (`train.fp8`): query, key and value, gate and up, down; by torchao.

Inputs, weights and gradients are scaled by the largest number of each tensor and multiplied in 8 bits; weights stay
bf16, and checkpoints do not change. Attention, the head and everything else stay as they are.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lamda.config.errors import UserError
from lamda.model import LaMDA

PRODUCTS = ("query", "key", "value", "gate", "up", "down")
MULTIPLE = 16


def check(model: LaMDA, device: torch.device) -> None:
    """Raise UserError, which names all that is missing."""
    missing = []
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        missing.append("a GPU of the Hopper class or newer (or Ada)")
    if find_spec("torchao") is None:
        missing.append("the package torchao (pip install 'lamda-pytorch[fp8]')")
    shapes = [module.get_parameter("weight").shape for _, module in _products(model)]
    odd = sorted({size for shape in shapes for size in shape if size % MULTIPLE})
    if odd:
        missing.append(f"widths that are multiples of {MULTIPLE}, not {', '.join(map(str, odd))}")
    if missing:
        raise UserError(f"train.fp8 needs {'; '.join(missing)}")


def convert(model: LaMDA, *, emulate: bool = False) -> None:
    """Let the products run in fp8. emulate: compute their rounding in wider numbers, on any device."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = {name for name, _ in _products(model)}
    convert_to_float8_training(
        model, module_filter_fn=lambda _, name: name in names, config=Float8LinearConfig(emulate=emulate)
    )


def _products(model: LaMDA) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in PRODUCTS]
