"""What the data path of a run must deliver: tokens to encode where text is streamed, bytes where blocks are ready."""

from __future__ import annotations

from dataclasses import dataclass

from lamda.config.schema import DataConfig

FEWEST, MOST = 8, 64
"""Lanes that a corpus is cut into where `data.lanes` says nothing, by its number of files (`lamda.data.lanes`)."""
ID = 2
"""Bytes of an id in ready blocks, where there are no more than 65,536 pieces."""


@dataclass(frozen=True)
class DataRates:
    """Per second. rank: tokens that a rank trains on. blocks: bytes that all ranks together read of ready blocks.

    encoded: tokens that a rank encodes at the least, with the most lanes and with the fewest.
    """

    rank: float
    encoded: tuple[float, float]
    blocks: float


def data_rates(data: DataConfig, *, ranks: int, tokens_per_second: float) -> DataRates:
    """A rank opens whole lanes, one or more: with more ranks than lanes, several encode the same text."""
    lanes = (data.lanes, data.lanes) if data.lanes else (MOST, FEWEST)
    encoded = tuple(tokens_per_second / min(ranks, count) for count in lanes)
    return DataRates(tokens_per_second / ranks, encoded, tokens_per_second * ID)
