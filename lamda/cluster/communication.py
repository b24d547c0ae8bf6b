"""What the ranks send each other in a step, by collective, as DeepSpeed 0.19.8 calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lamda.cluster.sharding import Sharding

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
_TRIPS: dict[Kind, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Traffic:
    """A collective's tensors in a step, and what of them a rank sends where they go round in a ring; bytes.

    at_most: whether it may be less.
    """

    kind: Kind
    tensors: int
    sent: int
    at_most: bool = False


def traffic(sizes: Sequence[int], sharding: Sharding, *, accumulation: int) -> list[Traffic]:
    """A step's collectives; `sizes` are the parameters', in elements.

    Stage 2 reduces by all-reduce, whatever its name for it. Stage 3 gathers the weights for each
    micro-batch's forward pass and, where they are more than it keeps, some of them again for its
    backward pass: all of them at the most. Sums of a few numbers are not counted; one rank sends nothing.
    """
    if sharding.ranks == 1:
        return []
    total, weight = sum(sizes), sharding.weight
    gradients = total * sharding.sent
    twice = False
    if sharding.stage == 3:
        small = sum(size for size in sizes if size < sharding.persistent)
        twice = total - small > sharding.live
        found = {
            "all-gather": (small + accumulation * (1 + twice) * (total - small)) * weight,
            "reduce-scatter": accumulation * gradients,
        }
    else:
        found = {"all-reduce": gradients * (accumulation if sharding.stage == 2 else 1)}
        if sharding.stage:
            found["all-gather"] = total * weight
    return [
        Traffic(
            kind, count, _TRIPS[kind] * count * (sharding.ranks - 1) // sharding.ranks, twice and kind == "all-gather"
        )
        for kind, count in found.items()
    ]
