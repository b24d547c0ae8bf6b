"""The FLOP/s of a device on the matrix products of a model, as a reference for its training step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lamda.config import ModelConfig
from lamda.proof.devices import wait


@dataclass(frozen=True)
class Shape:
    """A product [rows, inputs] x [inputs, outputs], and its count in a forward pass."""

    name: str
    inputs: int
    outputs: int
    count: int


def shapes(model: ModelConfig) -> list[Shape]:
    """The five products of a forward pass."""
    D, heads, F = model.d_model, model.n_heads * model.d_head, model.d_ff
    return [
        Shape("query, key, value", D, 3 * heads, model.n_layers),
        Shape("attention output", heads, D, model.n_layers),
        Shape("gate, up", D, 2 * F, model.n_layers),
        Shape("down", F, D, model.n_layers),
        Shape("logits", D, model.vocab_size, 1),
    ]


class MatrixRate:
    """The forward products and both of their gradients, in the proportions of a training step of `rows` tokens."""

    def __init__(self, model: ModelConfig, *, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self._products = [_Products(shape, rows, device, dtype) for shape in shapes(model)]
        self._flops = dict.fromkeys((each.shape.name for each in self._products), 0)
        self._seconds = dict.fromkeys(self._flops, 0.0)
        for each in self._products:
            each.run()

    def measure(self, seconds: float) -> float:
        """FLOP/s sustained over at least `seconds`."""
        wait()
        flops, began = 0, time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            for each in self._products:
                for _ in range(each.shape.count):
                    each.run()
                wait()
                self._seconds[each.shape.name] += -now + (now := time.perf_counter())
                self._flops[each.shape.name] += each.flops * each.shape.count
                flops += each.flops * each.shape.count
        return flops / (now - began)

    def report(self) -> dict[str, Any]:
        """FLOP/s over all measurements, and of each product."""
        return {
            "seconds": sum(self._seconds.values()),
            "flops_per_second": sum(self._flops.values()) / sum(self._seconds.values()),
            "by_product": {name: self._flops[name] / self._seconds[name] for name in self._flops},
        }


class _Products:
    """y = x w, and the gradients of x and w."""

    def __init__(self, shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.flops = 3 * 2 * rows * shape.inputs * shape.outputs

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=torch.float32).to(dtype)

        self._x, self._w = draw(rows, shape.inputs), draw(shape.outputs, shape.inputs)
        self._dy = draw(rows, shape.outputs)

    def run(self) -> None:
        _ = self._x @ self._w.T, self._dy @ self._w, self._dy.T @ self._x
