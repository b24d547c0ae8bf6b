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

CHUNK = 1 << 16
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
        pairs, unseen = _similar_pairs(shards, candidates, signed, keys)
        left += unseen
        _join(parents, pairs)
    return _roots(parents), left


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


def _similar_pairs(
    shards: Shards, candidates: Numbers, signed: Numbers, keys: NDArray[np.uint64]
) -> tuple[Numbers, int]:
    """Pairs of similar candidates that share a key, [n, 2]; and the number of those left after ROUNDS.

    In each round the first of each group is compared with all others of it; those that are similar leave with it.
    """
    order = np.argsort(keys, kind="stable")
    members, keys = signed[order], keys[order]
    found = [np.zeros((0, 2), np.int64)]
    for _ in range(ROUNDS):
        is_first = np.append(True, keys[1:] != keys[:-1]) if len(keys) else np.zeros(0, bool)
        is_alone = is_first & np.append(is_first[1:], True)[: len(is_first)]
        members, keys, is_first = members[~is_alone], keys[~is_alone], is_first[~is_alone]
        if not len(members):
            return np.concatenate(found), 0
        first = members[is_first][np.cumsum(is_first) - 1]
        is_similar = np.zeros(len(members), bool)
        for start in range(0, len(members), CHUNK):
            part = slice(start, start + CHUNK)
            one, other = (shards.signatures(candidates[each[part]]) for each in (first, members))
            is_similar[part] = (one == other).mean(axis=1) >= SIMILARITY
        found.append(np.stack([first[is_similar & ~is_first], members[is_similar & ~is_first]], axis=1))
        members, keys = members[~is_similar], keys[~is_similar]
    return np.concatenate(found), len(members)


def _join(parents: Numbers, pairs: Numbers) -> None:
    """Join the groups of each pair; the root of a group is its first member."""
    for one, other in pairs.tolist():
        one, other = _root(parents, one), _root(parents, other)
        parents[max(one, other)] = min(one, other)


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
