"""Every attention backend against `math` in float64: output and all gradients, and the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamda.config.errors import UserError
from lamda.config.schema import Backend
from lamda.model.attention.backends import backend_for, choose_backend
from lamda.model.attention.bias import BAND, causal_buckets
from lamda.model.weights import BUCKETS
from lamda.proof.attention import BACKENDS, REFERENCE
from lamda.proof.devices import device
from lamda.proof.findings import Findings, LeftOutError
from lamda.proof.sizes import Sizes

ALLOWED = 2.0
"""Times the error of `math` in the same precision that a backend may have, for the output and each gradient."""
REPEATS = 3
DOCUMENT_TOKENS = 41
NAMES = ("output", "queries", "keys", "values", "table")


@dataclass(frozen=True)
class Case:
    """Attention inputs. shape: [B, H, L, K]. sharpness: multiplies the scores, which grow in training."""

    shape: tuple[int, int, int, int]
    has_documents: bool
    sharpness: int

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{size}{', documents' if self.has_documents else ''}{', large scores' if self.sharpness > 1 else ''}"

    def run(self, backend: Backend, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients of queries, keys, values and table; the inputs are exact in bf16."""
        B, H, L, K = self.shape
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(shape, generator=generator)
            return drawn.bfloat16().to(device()).to(dtype)

        packed, table, d_out = draw(B, L, 3, H, K, scale=K**-0.25), draw(BUCKETS, H), draw(B, L, H, K)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
        q, k, v, table = inputs = [each.detach().requires_grad_() for each in (self.sharpness * q, k, v, table)]
        out = attend(backend, q, k, v, table, self._documents())
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.transpose(1, 2))]

    def _documents(self) -> Tensor | None:
        B, _, L, _ = self.shape
        if not self.has_documents:
            return None
        return (torch.arange(L, device=device()) // DOCUMENT_TOKENS % 3).expand(B, L).contiguous()


def attend(name: Backend, q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor, documents_BL: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] as the model computes it."""
    backend, length = backend_for(name), q.shape[2]
    buckets_N = causal_buckets(max(length, BAND), device=q.device)
    bias = backend.bias(table_RH, buckets_N, queries=length, keys=length)
    tokens_BL = torch.empty(q.shape[0], length, dtype=torch.long, device=q.device)
    return backend.attend(q, k, v, bias, backend.mask(tokens_BL, documents_BL))


def measure(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Compare each backend in each case, in bf16."""
    for case in _cases(sizes):
        exact = case.run(REFERENCE, torch.float64)
        allowed = _errors(case.run(REFERENCE, torch.bfloat16), exact)
        for name in BACKENDS:
            if name != REFERENCE:
                findings.attempt(f"{name}: {case}", partial(_compare, name, case, exact, allowed))


def _cases(sizes: Sizes) -> Iterator[Case]:
    for shape, has_documents, sharpness in product(sizes.shapes, (False, True), (1, 32)):
        yield Case(shape, has_documents, sharpness)


def _compare(name: Backend, case: Case, exact: list[Tensor], allowed: dict[str, float]) -> dict[str, Any]:
    try:
        choose_backend(name, device(), dtype=torch.bfloat16, width=case.shape[-1], training=True)
    except UserError as error:
        raise LeftOutError(str(error)) from error
    first = case.run(name, torch.bfloat16)
    errors = _errors(first, exact)
    ratios = {each: errors[each] / allowed[each] for each in NAMES}
    repeats = [case.run(name, torch.bfloat16) for _ in range(REPEATS)]
    is_same = all(torch.equal(one, other) for again in repeats for one, other in zip(first, again, strict=True))
    return {
        "error_to_that_of_math": ratios,
        "is_equal": max(ratios.values()) <= ALLOWED,
        "same_bits_each_time": is_same,
    }


def _errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """The norm of the difference by that of the exact value."""
    pairs = zip(NAMES, found, exact, strict=True)
    return {name: ((one.double() - true).norm() / true.norm()).item() for name, one, true in pairs}
