"""Whether every rank still holds the same weights: a bit that turned over in one of them shows here.

Each rank hashes its copy of the model's weights, and of the fp32 weights that it owns as they would be
rounded. The owners' parts add up to the hash that every copy must have, so that the wrong rank is known
even where there are only two. Without ZeRO and in fp32 there is no second copy, and the ranks are outvoted.
Frozen weights are measured by rank 0's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lamda.distributed import gather
from lamda.engines.deepspeed.fragments import fragments
from lamda.engines.weight_check import outvoted

if TYPE_CHECKING:
    from lamda.engines.deepspeed.engine import Engine

CHUNK = 1 << 22
"""Elements hashed at a time; each takes some 32 bytes for a moment."""


def odd_ranks(engine: Engine) -> list[int]:
    """The ranks whose weights are not those that the fp32 weights give. Every rank calls it.

    At ZeRO stage 3 no rank holds a copy, and there is nothing to compare.
    """
    if engine.stage == 3:
        return []
    offsets, own = {}, torch.zeros(2, dtype=torch.int64, device=engine.device)
    at = 0
    for name, parameter in engine.model.named_parameters():
        offsets[name] = (at, parameter.dtype)
        own[0] += _hash(parameter.detach().view(-1), start=at)
        at += parameter.numel()
    for fragment in fragments(engine.deepspeed):
        if fragment.is_owner:
            start, narrow = offsets[fragment.name]
            own[1] += _hash(fragment.weight.to(narrow), start=start + fragment.start)
    truth = own[1].clone()
    dist.all_reduce(truth)
    copies = gather(own[0].item())
    if engine.stage == 0 and not engine.is_bf16:
        return outvoted(copies)
    return [rank for rank, copy in enumerate(copies) if copy != truth.item()]


def _hash(flat: torch.Tensor, *, start: int) -> torch.Tensor:
    """Sum modulo 2^64 of bits times an odd number for each place: any one changed element changes it."""
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, len(bits), CHUNK):
        part = bits[begin : begin + CHUNK].long()
        places = torch.arange(start + begin, start + begin + len(part), device=flat.device)
        total += (part * (2 * places + 1)).sum()
    return total
