"""What the data path of a run must deliver: tokens to encode where text is streamed, bytes where rows are ready."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamda.config.schema import Config

FEWEST, MOST = 8, 64
"""Lanes of a large source: of one file that cannot be cut, and of many or of plain text (`lamda.data.lanes`)."""

EDGE = 2
"""Rows of a batch by which a rank's part of it moves over the lanes at its edges (`lamda.data.loader`)."""

FIRST_TOKENS, WINDOW_ROWS = 1 << 17, 16384
"""Tokens of the smallest window (`lamda.data.windows`), and rows of a window of `none` (`lamda.data.corpus`)."""

ID, ROW_ID = 2, 4
"""Bytes of an id in ready rows, where there are no more than 65,536 pieces, and in memory."""

DOCUMENT_BYTES, DOCUMENT_TOKENS = 300, 300
"""Host memory of a document's name and spans beside its ids, and tokens of one, assumed."""


@dataclass(frozen=True)
class DataRates:
    """Per second. rank: tokens that a rank trains on. blocks: bytes that all ranks together read of ready rows.

    encoded: tokens that a rank encodes at the most, with the most lanes and with the fewest.
    """

    rank: float
    encoded: tuple[float, float]
    blocks: float


def data_rates(config: Config, *, ranks: int, tokens_per_second: float) -> DataRates:
    """A rank encodes whole lanes, one or more: with more ranks than lanes, several encode the same text."""
    most, fewest = (tokens_per_second * share for share in _shares(config, ranks))
    return DataRates(tokens_per_second / ranks, (most, fewest), tokens_per_second * ID)


def loader_bytes(config: Config, *, ranks: int) -> int:
    """Host memory of a rank's rows, with the most lanes: its part of two windows. Ready rows of an epoch are mapped.

    One of the two may be the last of an epoch, which is up to half as long again. Documents much shorter than
    DOCUMENT_TOKENS need more.
    """
    length, shuffle = config.data.sequence_length, config.data.shuffle
    if shuffle == "epoch":
        return 0
    rows = max(shuffle if isinstance(shuffle, int) else WINDOW_ROWS, FIRST_TOKENS // length, MOST)
    bytes_per_token = ROW_ID + DOCUMENT_BYTES / DOCUMENT_TOKENS
    return math.ceil(2.5 * rows * (length + 1) * bytes_per_token * _shares(config, ranks)[0])


def _shares(config: Config, ranks: int) -> tuple[float, float]:
    """Of all text, what a rank encodes at the most, with the most lanes and with the fewest."""
    counts = (1, 1) if config.data.shuffle == "none" else (MOST, FEWEST)
    most, fewest = (_lanes_of_a_rank(count, ranks, config.train.global_batch_size) / count for count in counts)
    return most, fewest


def _lanes_of_a_rank(count: int, ranks: int, batch: int) -> int:
    """Equal lanes that a rank reads at the most: its part of a step's rows, sorted by lane, and the edges of it."""
    margin = EDGE * ranks / batch
    ends = ((count * (rank - margin) / ranks, count * (rank + 1 + margin) / ranks) for rank in range(ranks))
    return max(min(count, math.ceil(high)) - max(0, math.floor(low)) for low, high in ends)
