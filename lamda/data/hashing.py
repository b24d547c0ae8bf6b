"""Fixed hashes: of integers, so that the order of data does not depend on a library's generator, and of documents."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), elementwise."""
    with np.errstate(over="ignore"):
        z = values + _STEP
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


def mixed(*key: int) -> NDArray[np.uint64]:
    """A hash of `key`, [1]."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part))
    return state


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(length)`, a function of `key`."""
    hashes = splitmix64(mixed(*key) ^ splitmix64(np.arange(length, dtype=np.uint64)))
    return np.argsort(hashes, kind="stable")


def document_hash(text: str) -> str:
    """The hash by which a document is known, 16 hex digits."""
    return blake2b(text.encode(), digest_size=8).hexdigest()
