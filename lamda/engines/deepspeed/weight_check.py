"""Detects silent corruption of weights: any single flipped bit on one rank.

Each rank hashes its copy of the model's weights, and the fp32 weights that it owns as they would be rounded. The
owners' hashes add up to the hash that every copy must have, so that the wrong rank is known even if there are only
two. Without ZeRO and in fp32 there is no second copy, and the majority decides. For frozen weights rank 0 decides.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist

from lamda.distributed import gather, minority_ranks
from lamda.engines.deepspeed.fragments import fragments

CHUNK = 1 << 22  # elements hashed together; each needs some 32 bytes


def corrupted_ranks(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """The ranks whose weights differ from the fp32 weights; every rank calls it. ZeRO stage 3 has no copies."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return []
    offsets, offset = {}, 0
    copy = expected = torch.zeros((), dtype=torch.int64, device=next(engine.module.parameters()).device)
    for name, parameter in engine.module.named_parameters():
        offsets[name] = (offset, parameter.dtype)
        copy = copy + _hash(parameter.detach().view(-1), start=offset)
        offset += parameter.numel()
    for fragment in fragments(engine):
        if fragment.is_owner:
            start, dtype = offsets[fragment.name]
            expected = expected + _hash(fragment.weight.to(dtype), start=start + fragment.start)
    dist.all_reduce(expected)
    copies = gather(int(copy.item()))
    if stage == 0 and not engine.bfloat16_enabled():
        return minority_ranks(copies)
    return [rank for rank, copy_hash in enumerate(copies) if copy_hash != expected.item()]


def _hash(flat: torch.Tensor, *, start: int) -> torch.Tensor:
    """The sum modulo 2^64 of each element's bits times an odd number: any one changed element changes it."""
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, len(bits), CHUNK):
        part = bits[begin : begin + CHUNK].long()
        positions = torch.arange(start + begin, start + begin + len(part), device=flat.device)
        total += (part * (2 * positions + 1)).sum()
    return total
