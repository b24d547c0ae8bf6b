"""Who is wrong where copies differ."""

from __future__ import annotations

from collections import Counter


def outvoted(copies: list[int]) -> list[int]:
    """The ranks whose hash is not the one that most have; all of them where two hashes have as many."""
    (most, votes), *others = Counter(copies).most_common()
    if others and others[0][1] == votes:
        return list(range(len(copies)))
    return [rank for rank, copy in enumerate(copies) if copy != most]
