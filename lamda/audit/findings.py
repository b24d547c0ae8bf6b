"""What to leave out of a corpus and why, from the records of an audit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamda.audit.duplicates import Numbers, exact_groups, near_groups
from lamda.audit.records import EMPTY, OVERLAP, PII, Shards
from lamda.data.drop_list import Entry

REASONS = {
    "overlap": "evaluation overlap",
    "empty": "no letter or digit",
    "pii": "personal data",
    "exact": "exact duplicate",
    "near": "near duplicate",
}
"""Why a document is left out: names of options and of the list. The first that holds counts."""

_FLAGS = {"overlap": OVERLAP, "empty": EMPTY, "pii": PII}
_NUMBERS = {name: number for number, name in enumerate(REASONS, start=1)}
_STAYS = 0


@dataclass(frozen=True)
class Findings:
    """Why each document is left out.

    reasons: [n], the number of a reason from 1, or 0. kept: [n], for an exact duplicate the first copy, for a near
    duplicate the document that stays, for others itself. not_compared: candidates for near duplicates that were left,
    in bands that too many documents share.
    """

    shards: Shards
    reasons: NDArray[np.uint8]
    kept: Numbers
    not_compared: int

    def counts(self) -> dict[str, tuple[int, int]]:
        """Documents and bytes that are left out, by name of the reason."""
        found = {}
        for name, number in _NUMBERS.items():
            is_here = self.reasons == number
            found[name] = int(is_here.sum()), int(self.shards.documents["size"][is_here].sum())
        return found

    def entries(self) -> Iterator[Entry]:
        """The entries of the drop list, sorted by hash, each hash once: the first copy says why all are left out."""
        documents = self.shards.documents
        dropped = np.flatnonzero(self.reasons)
        hashes, first = np.unique(documents["hash"][dropped], return_index=True)
        names = ["", *REASONS.values()]
        for key, number in zip(hashes.tolist(), dropped[first].tolist(), strict=True):
            kept = int(self.kept[number])
            place = None if kept == number else (int(documents["file"][kept]), position(documents[kept]))
            yield Entry(f"{key:016x}", names[self.reasons[number]], place)

    def groups(self, reason: str) -> list[Numbers]:
        """The documents that stay with their duplicates, largest group first."""
        members = np.flatnonzero(self.reasons == _NUMBERS[reason])
        members = members[np.argsort(self.kept[members], kind="stable")]
        edges = np.flatnonzero(np.diff(self.kept[members], prepend=-1))
        parts = np.split(members, edges[1:]) if len(members) else []
        found = [np.concatenate([self.kept[part[:1]], part]) for part in parts]
        return sorted(found, key=lambda group: (-len(group), int(group[0])))


def position(document: np.void) -> int:
    """As `drop_list.position_of`, of a record."""
    return int(document["byte"]) or int(document["line"])


def find(shards: Shards, chosen: Collection[str]) -> Findings:
    """The documents to leave out for the chosen reasons. A duplicate stays if all before it are left out."""
    documents = shards.documents
    reasons, kept = np.zeros(len(documents), np.uint8), np.arange(len(documents))
    for name in (name for name in _FLAGS if name in chosen):
        reasons[(reasons == _STAYS) & (documents["flags"] & _FLAGS[name] > 0)] = _NUMBERS[name]
    rest = np.flatnonzero(reasons == _STAYS)
    first = rest[exact_groups(documents["hash"][rest])]
    not_compared = 0
    if "near" in chosen:
        distinct = rest[first == rest]
        roots, not_compared = near_groups(shards, distinct)
        root = np.arange(len(documents))
        root[distinct] = distinct[roots]
        is_near = root[first] != first
        reasons[rest[is_near]], kept[rest[is_near]] = _NUMBERS["near"], root[first[is_near]]
    if "exact" in chosen:  # also a copy of a near duplicate
        is_copy = first != rest
        reasons[rest[is_copy]], kept[rest[is_copy]] = _NUMBERS["exact"], first[is_copy]
    return Findings(shards, reasons, kept, not_compared)
