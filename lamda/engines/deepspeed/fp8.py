"""fp8 for the matmuls with the most FLOPs (`train.fp8`): query, key and value, gate and up, down; by torchao.

Inputs, weights and gradients are scaled by the largest absolute value of each tensor and multiplied in 8 bits.
Weights stay bf16, so checkpoints do not change; attention, the head and everything else are not converted.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.model import LaMDA
from lamda.model.weights import weight_shapes

PRODUCTS = ("query", "key", "value", "gate", "up", "down")
MULTIPLE = 16


def check(config: ModelConfig, device: torch.device) -> None:
    """Raise UserError naming every requirement that is missing."""
    missing = []
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        missing.append("a GPU of the Hopper class or newer (or Ada)")
    if find_spec("torchao") is None:
        missing.append("the package torchao (pip install 'lamda-pytorch[fp8]')")
    shapes = [shape for name, shape in weight_shapes(config).items() if _is_product(name.removesuffix(".weight"))]
    unaligned = sorted({size for shape in shapes for size in shape if size % MULTIPLE})
    if unaligned:
        missing.append(f"widths that are multiples of {MULTIPLE}, not {', '.join(map(str, unaligned))}")
    if missing:
        raise UserError(f"train.fp8 needs {'; '.join(missing)}")


def convert(model: LaMDA, *, emulate: bool = False) -> None:
    """Convert these matmuls to fp8. emulate: only round as fp8 does, on any device."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model, module_filter_fn=lambda _, name: _is_product(name), config=Float8LinearConfig(emulate=emulate)
    )


def _is_product(module: str) -> bool:
    return module.rpartition(".")[2] in PRODUCTS
