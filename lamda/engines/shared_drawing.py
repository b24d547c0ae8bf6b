"""Initial weights drawn by all ranks together: a generator is serial, so each rank draws a part for the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lamda.distributed import World
from lamda.durable import Progress
from lamda.model.initialization import InitialWeight

PIECE = 1 << 24
"""Elements that a rank sends at a time."""


def drawn_pieces(
    weights: Mapping[str, InitialWeight], *, world: World, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, int, Tensor]]:
    """Every weight, flat and in pieces, on every rank: (name, first element, values [n] in `dtype`).

    In rounds of as many weights as there are ranks, in the order given; similar sizes should be neighbors. In a round
    each rank draws one weight and then sends it piece by piece, so it holds one weight in fp32 and one piece.
    """
    names = iter(weights)
    while group := tuple(islice(names, world.world_size)):
        own = weights[group[world.rank]].draw().view(-1) if world.rank < len(group) else None
        for owner, name in enumerate(group):
            numel = prod(weights[name].shape)
            for start in range(0, numel, PIECE):
                length = min(PIECE, numel - start)
                if own is not None and owner == world.rank:
                    piece = own.narrow(0, start, length).to(device, dtype)
                else:
                    piece = torch.empty(length, device=device, dtype=dtype)
                if world.world_size > 1:
                    dist.broadcast(piece, src=owner)
                yield name, start, piece
        del own


def whole(
    pieces: Iterable[tuple[str, int, Tensor]], weights: Mapping[str, InitialWeight], *, progress: Progress
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The weights of fp32 pieces, one after the other."""
    for name, start, values in pieces:
        if start == 0:
            joined = np.empty(prod(weights[name].shape), np.float32)
        joined[start : start + len(values)] = values.numpy()
        progress()
        if start + len(values) == len(joined):
            yield name, joined.reshape(weights[name].shape)


def largest_first(weights: Mapping[str, InitialWeight]) -> dict[str, InitialWeight]:
    """The weights by falling size."""
    return dict(sorted(weights.items(), key=lambda item: -prod(item[1].shape)))
