"""Which ranks are wrong where copies of the weights differ."""

from __future__ import annotations

from collections import Counter


def minority_ranks(copies: list[int]) -> list[int]:
    """The ranks whose hash is not the most frequent one; all ranks where two hashes are equally frequent."""
    (most, votes), *others = Counter(copies).most_common()
    if others and others[0][1] == votes:
        return list(range(len(copies)))
    return [rank for rank, copy in enumerate(copies) if copy != most]
