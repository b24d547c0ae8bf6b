"""Duplicates among documents: exact ones by hash, near ones by MinHash signatures in bands (LSH)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lamda.audit.records import SIGNATURE, SIGNED, Shards
from lamda.data.hashing import splitmix64

ROWS = 6
BANDS = SIGNATURE // ROWS
"""Documents of similarity s share at least one band with probability 1 - (1 - s**ROWS)**BANDS: 0.998 for s = 0.8."""

SIMILARITY = 0.8
"""Fraction of equal numbers in two signatures from which documents count as near duplicates."""

ROUNDS = 64
"""Documents of a band that are compared with all later ones in it."""

CHUNK = 1 << 12
"""Documents whose signatures are in memory at a time."""

Numbers = NDArray[np.int64]


def exact_groups(hashes: NDArray[np.uint64]) -> Numbers:
    """For each document the first one with the same hash."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1]) if len(hashes) else np.zeros(0, bool)
    first = np.empty(len(hashes), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def near_groups(shards: Shards, candidates: Numbers) -> tuple[Numbers, int]:
    """For each candidate the first one of its group, as indices of `candidates`, and how many were not compared.

    A group is all that is connected by pairs of at least SIMILARITY. candidates: numbers of documents, in order.
    """
    parents = np.arange(len(candidates))
    signed = np.flatnonzero(shards.documents["flags"][candidates] & SIGNED)
    left = 0
    for band in range(BANDS):
        keys = _band_keys(shards, candidates[signed], band)
        order = np.argsort(keys, kind="stable")
        left += _join_similar(parents, shards, candidates, signed[order], keys[order])
        parents = _roots(parents)
    return parents, left


def _band_keys(shards: Shards, numbers: Numbers, band: int) -> NDArray[np.uint64]:
    """A hash of a band of each signature."""
    keys = np.empty(len(numbers), np.uint64)
    columns = slice(band * ROWS, (band + 1) * ROWS)
    for start in range(0, len(numbers), CHUNK):
        found = np.zeros(len(numbers[start : start + CHUNK]), np.uint64)
        for column in shards.signatures(numbers[start : start + CHUNK], columns).T:
            found = splitmix64(found ^ column)
        keys[start : start + CHUNK] = found
    return keys


def _join_similar(
    parents: Numbers, shards: Shards, candidates: Numbers, members: Numbers, keys: NDArray[np.uint64]
) -> int:
    """Join similar members that share a key; returns how many were left after ROUNDS. members: sorted by key.

    In each round the first of each group is compared with all others of it; those that are similar leave with it.
    """
    for _ in range(ROUNDS):
        is_first = np.append(True, keys[1:] != keys[:-1]) if len(keys) else np.zeros(0, bool)
        is_alone = is_first & np.append(is_first[1:], True)[: len(is_first)]
        members, keys, is_first = members[~is_alone], keys[~is_alone], is_first[~is_alone]
        if not len(members):
            return 0
        first = members[is_first][np.cumsum(is_first) - 1]
        is_similar = parents[first] == parents[members]  # joined by a band before
        others = np.flatnonzero(~is_similar)
        for start in range(0, len(others), CHUNK):
            part = others[start : start + CHUNK]
            one, other = (shards.signatures(candidates[each[part]]) for each in (first, members))
            part = part[(one == other).mean(axis=1) >= SIMILARITY]
            is_similar[part] = True
            for pair in zip(first[part].tolist(), members[part].tolist(), strict=True):
                low, high = sorted(_root(parents, member) for member in pair)
                parents[high] = low
        members, keys = members[~is_similar], keys[~is_similar]
    return len(members)


def _root(parents: Numbers, member: int) -> int:
    while (parent := int(parents[member])) != member:
        parents[member] = parents[parent]
        member = parent
    return member


def _roots(parents: Numbers) -> Numbers:
    """The root of every member."""
    while not np.array_equal(parents, found := parents[parents]):
        parents = found
    return parents
