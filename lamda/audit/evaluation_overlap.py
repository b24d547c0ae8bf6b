"""Overlap with evaluation text: its n-grams, and the documents that share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from lamda.audit.words import Hashes, Offsets, ngrams, words
from lamda.config.errors import UserError

WORDS = 13
"""Words per n-gram, as in GPT-3 (arXiv 2005.14165, appendix C)."""

BYTES_PER_NGRAM = 64
FILTER_BITS = 22
READ_TOGETHER = 1000


class EvaluationNgrams:
    """The n-grams of evaluation documents. documents, too_short: their number, and of those, without an n-gram.

    Raises UserError if they need more than `memory` bytes.
    """

    def __init__(self, texts: Iterable[str], *, memory: int) -> None:
        hashes, owners, self.documents, self.too_short, total = [], [], 0, 0, 0
        for batch in _batches(texts):
            found, offsets = ngrams(*words([text.encode() for text in batch]), WORDS)
            counts = np.diff(offsets)
            hashes.append(found)
            owners.append(np.repeat(np.arange(self.documents, self.documents + len(batch), dtype=np.int64), counts))
            self.documents += len(batch)
            self.too_short += int((counts == 0).sum())
            total += len(found)
            if total * BYTES_PER_NGRAM > memory:
                raise UserError(
                    f"--memory {memory / 1e9:g}: the n-grams of --against need more ({BYTES_PER_NGRAM} bytes each, and "
                    f"there are over {total:,}); raise --memory, or name fewer files"
                )
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(every, kind="stable")
        self._hashes = every[order]
        self._owners = np.concatenate([np.zeros(0, np.int64), *owners])[order]
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True
        self._is_seen = np.zeros(len(every), bool)

    def counts(self, found: Hashes, offsets: Offsets) -> NDArray[np.int64]:
        """How many n-grams of each document are in evaluation text. found, offsets: as `words` gives them."""
        found, offsets = ngrams(found, offsets, WORDS)
        at = np.flatnonzero(self._filter[found >> np.uint64(64 - FILTER_BITS)])
        place = np.searchsorted(self._hashes, found[at])
        is_same = place < len(self._hashes)
        is_same[is_same] = self._hashes[place[is_same]] == found[at[is_same]]
        self._is_seen[place[is_same]] = True
        return np.diff(np.searchsorted(at[is_same], offsets))

    def seen(self) -> list[int]:
        """The numbers of the evaluation documents that share an n-gram with one of those counted."""
        first = np.searchsorted(self._hashes, self._hashes)
        return np.unique(self._owners[self._is_seen[first]]).tolist()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    for first in left:
        yield list(chain([first], islice(left, READ_TOGETHER - 1)))
