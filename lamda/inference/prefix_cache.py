"""A cache of computed prompts, for prompts that begin alike: a conversation's next turn repeats all earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamda.inference.cache import Prefix
from lamda.inference.generation import Pieces, prefill_pieces
from lamda.model import LaMDA

_WORTH_KEEPING = 32
"""Shorter prompts are computed again: many of them would make every look-up slow."""


@dataclass(frozen=True, eq=False)
class _Entry:
    owner: str
    ids_P: np.ndarray
    prefix: Prefix


class PrefixCache:
    """The prompts used last, `capacity` tokens in all. Use it from one thread at a time.

    tokens: held now. Keys and values are reused token by token, so results agree with uncached ones to rounding.
    """

    def __init__(self, model: LaMDA, *, capacity: int) -> None:
        self.tokens = 0
        self._model, self._capacity = model, capacity
        self._entries: list[_Entry] = []

    def prefill_pieces(self, ids: Sequence[int], *, owner: str = "") -> Pieces[Prefix]:
        """As `lamda.inference.generation.prefill_pieces`, computing only what follows the longest known beginning.

        Only prompts of the same owner are known, so that nobody learns from an answer's speed what others asked.
        """
        new_P = np.array(ids)
        known = [(_common(entry.ids_P, new_P), entry) for entry in self._entries if entry.owner == owner]
        shared, entry = max(known, key=lambda each: each[0], default=(0, None))
        if entry is None or shared < _WORTH_KEEPING:
            prefix = yield from prefill_pieces(self._model, ids)
        elif shared == len(ids) == len(entry.ids_P):
            prefix = replace(entry.prefix, cached=shared)
        else:
            shared = min(shared, len(ids) - 1)  # the last token is computed for its logits
            prefix = yield from prefill_pieces(self._model, ids, start=entry.prefix, shared=shared)
        if entry is not None and shared >= _WORTH_KEEPING:
            self._remove(entry)
            if shared < len(entry.ids_P) - 1:  # else this is its next turn, where only the last symbol differs
                self._keep(entry)
        self._keep(_Entry(owner, new_P, prefix))
        return prefix

    def _keep(self, entry: _Entry) -> None:
        if not _WORTH_KEEPING <= len(entry.ids_P) <= self._capacity:
            return
        self._entries.append(entry)
        self.tokens += len(entry.ids_P)
        while self.tokens > self._capacity:
            self._remove(self._entries[0])

    def _remove(self, entry: _Entry) -> None:
        if entry in self._entries:  # another prompt may have removed it between two pieces
            self._entries.remove(entry)
            self.tokens -= len(entry.ids_P)


def _common(one_P: np.ndarray, other_P: np.ndarray) -> int:
    """The length of the longest common beginning."""
    length = min(len(one_P), len(other_P))
    differs = one_P[:length] != other_P[:length]
    return int(differs.argmax()) if differs.any() else length
