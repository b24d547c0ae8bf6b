"""The corpus of a run: its lanes, their mixture, and the fingerprint of everything that the order depends on."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import groupby, islice
from typing import Any

from lamda.config.errors import UserError
from lamda.config.schema import Config, DataConfig, Shuffle
from lamda.data.blocks import Packing
from lamda.data.card import Card, load_card
from lamda.data.documents import Document, Form, RawText
from lamda.data.drop_list import NOWHERE, DropList
from lamda.data.files import File, no_op
from lamda.data.lanes import RAW_TEXT, Cursor, Lane, in_turn
from lamda.data.order import BEGINNING, DataStart, Mixture, make_mixture
from lamda.data.partitioning import MAX_LANES, cut_into_lanes
from lamda.data.quarantine import BadLine, examples, few
from lamda.data.resolving import find, report
from lamda.data.sections import SECTION
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import Shape

log = logging.getLogger(__name__)

SCANNED = 1000
"""Documents that are searched for domain names if the card has none."""

WINDOW_ROWS = 16384
"""Rows per window if `data.shuffle` is not a number."""

FORMAT = 2
"""Version of the sample order: incremented when the same text gives different samples."""


@dataclass(frozen=True)
class Corpus:
    """The training text of a run, cut into lanes.

    sequence_length: L, targets per row. shuffle: as `data.shuffle`. start: where the run begins to read it. held_out:
    identifies the documents that were left out for validation (`lamda.data.split`).
    """

    card: Card
    lanes: tuple[Lane, ...]
    sequence_length: int
    shuffle: Shuffle
    start: DataStart = BEGINNING
    held_out: list[int | str] | None = None

    @property
    def form(self) -> Form:
        """The kind of records."""
        return self.lanes[0].form

    @property
    def drop(self) -> DropList | None:
        """The documents that are left out."""
        return self.lanes[0].drop

    @property
    def files(self) -> list[File]:
        """The files without duplicates, sorted by address."""
        files = {each.file.url: each.file for lane in self.lanes for each in lane.slices}
        return [files[url] for url in sorted(files)]

    def waiting(self, on_wait: Callable[[], object]) -> Corpus:
        """The same with a callback that is called while waiting for a server."""
        lanes = (
            replace(lane, slices=tuple(replace(each, file=replace(each.file, on_wait=on_wait)) for each in lane.slices))
            for lane in self.lanes
        )
        return replace(self, lanes=tuple(lanes))

    @cached_property
    def sources(self) -> tuple[tuple[Lane, ...], ...]:
        """The lanes of each source."""
        return tuple(tuple(lanes) for _, lanes in groupby(self.lanes, key=lambda lane: lane.source.name))

    @cached_property
    def mixture(self) -> Mixture:
        """The source of each sample."""
        names = [lanes[0].source.name for lanes in self.sources]
        return make_mixture(names, self.card.stages).beginning_at(self.start)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The window sizes of each source."""
        full = self.sequence_length * (self.shuffle if isinstance(self.shuffle, int) else WINDOW_ROWS)
        return tuple(
            Shape(
                int(slots),
                tuple(lane.axis_length for lane in lanes),
                self.sequence_length,
                full,
                is_epoch=self.shuffle == "epoch",
            )
            for lanes, slots in zip(self.sources, self.mixture.max_slots, strict=True)
        )

    @property
    def is_in_order(self) -> bool:
        """Whether rows are in the order of the text."""
        return self.shuffle == "none"

    def domains(self) -> list[str]:
        """Domains whose loss is reported separately: of the form, the card, or the first documents; at most 63."""
        if self.form.domains:
            return list(self.form.domains)
        if all(source.domain is None for source in self.card.sources):
            return [source.name for source in self.card.sources]
        if self.card.domains:
            return list(self.card.domains)
        return sorted({document.domain for document in islice(self.documents_once(), SCANNED)})[:63]

    def documents_once(self) -> Iterator[Document]:
        """The documents of an epoch, one from each lane in turn."""
        return (entry for entry in self.entries_once() if isinstance(entry, Document))

    def entries_once(self) -> Iterator[Document | BadLine]:
        """The documents and bad lines of an epoch, one from each lane in turn."""
        return in_turn([lane.read(Cursor()) for lane in self.lanes])


def open_corpus(
    config: DataConfig, *, form: Form = RAW_TEXT, on_wait: Callable[[], object] = no_op, whole_texts: bool = False
) -> Corpus:
    """Resolve the card's files and cut them into lanes. Raises UserError if something is missing.

    on_wait: called while waiting for a server, now and when text is read, from any thread. whole_texts: see
    `lamda.data.resolving.find`.
    """
    if config.packing not in form.packings:
        raise UserError(
            f"data.packing {config.packing} is not for these documents: set it to {' or '.join(form.packings)} "
            "(raw text is cut into full rows, dialogues stay whole)"
        )
    card = load_card(config)
    lanes: list[Lane] = []
    for source in card.sources:
        found = find(source, form=form, on_wait=on_wait, whole_texts=whole_texts)
        report(source, found)
        lanes += cut_into_lanes(
            source,
            found.files,
            sequence_length=config.sequence_length,
            max_lanes=1 if config.shuffle == "none" else MAX_LANES,
            first=len(lanes),
            max_bad_line_fraction=config.max_bad_line_fraction,
            form=form,
        )
    corpus = Corpus(card, tuple(lanes), config.sequence_length, config.shuffle)
    return corpus if config.drop is None else _without(config.drop, corpus)


def _without(path: str, corpus: Corpus) -> Corpus:
    """The corpus without the documents of a drop list. Raises UserError if the list does not fit its files."""
    if not isinstance(corpus.form, RawText):
        raise UserError("data.drop: a list names raw texts, and these are dialogues; remove the key")
    drop = DropList.of(path)
    entries = drop.entries()
    if problems := list(entries.problems(corpus.files)):
        raise UserError(
            f"data.drop {path}: does not fit data.files: {'; '.join(problems[:3])}; write it again with `lamda data "
            "clean` from the files of this run"
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(entries.reasons.items()))
    log.info("data.drop %s: leaves out %s texts (%s)", path, f"{len(entries):,}", reasons)
    unknown = [file.url for file in corpus.files if entries.number_of(file.url) == NOWHERE]
    if unknown:
        log.warning("data.drop %s was made without %d files of data.files, such as %s", path, len(unknown), unknown[0])
    return replace(corpus, lanes=tuple(replace(lane, drop=drop) for lane in corpus.lanes))


def packing_of(config: Config) -> Packing:
    """How this run packs tokens into rows."""
    return Packing(config.data.sequence_length, config.data.packing)


def fingerprint(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the order of samples depends on, by name. Batch sizes and ranks are not part of it."""
    return {
        "format": FORMAT,
        "files": [[[*each.file.identity, *each.key] for each in lane.slices] for lane in corpus.lanes],
        "contents": [[file.name, file.content] for file in corpus.files],
        "text": [[source.text, source.domain] for source in corpus.card.sources],
        "weights": [[start, weights] for start, weights in corpus.card.stages],
        "tokenizer": tokenizer.sha256,
        "packing": config.data.packing,
        "sequence_length": config.data.sequence_length,
        "shuffle": config.data.shuffle,
        "seed": config.run.seed,
        **({} if corpus.drop is None else {"drop": corpus.drop.sha256}),
        **_text_rules(corpus.files),
        **({} if corpus.held_out is None else {"held_out": corpus.held_out}),
        **corpus.form.identity,
    }


def source_identities(corpus: Corpus, fingerprint: Mapping[str, Any]) -> list[str]:
    """What the rows of each source depend on, as a hash: the corpus's fingerprint without weights and other sources."""
    shared = {name: fingerprint[name] for name in fingerprint.keys() - {"files", "contents", "text", "weights"}}
    contents, lanes = dict(fingerprint["contents"]), iter(fingerprint["files"])
    found = []
    for source, text in zip(corpus.sources, fingerprint["text"], strict=True):
        names = sorted({each.file.name for lane in source for each in lane.slices})
        own = [list(islice(lanes, len(source))), [[name, contents[name]] for name in names], text]
        found.append(sha256(json.dumps([shared, own], sort_keys=True).encode()).hexdigest()[:32])
    return found


def _text_rules(files: Sequence[File]) -> dict[str, Any]:
    """How texts are read that versions before would have read otherwise, or not at all."""
    encodings = Counter(file.encoding for file in files if file.encoding is not None)
    if not encodings and not any(file.is_sectioned for file in files):
        return {}
    return {"texts": {"section": SECTION, "encodings": dict(sorted(encodings.items()))}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The entries in which two fingerprints differ; `contents` if a file is known to have changed.

    `texts` alone is last: a changed file may be in another encoding.
    """
    differing = [name for name in {**current, **saved} if saved.get(name) != current.get(name)]
    names = [name for name in differing if name not in ("contents", "texts")]
    return names or (["contents"] if changed_files(saved, current) else [name for name in differing if name == "texts"])


def changed_files(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Files whose content is known to differ between two fingerprints; old fingerprints have no contents."""
    before, now = (_contents(each) for each in (saved, current))
    return [name for name in before if None not in before[name] + now.get(name, []) and before[name] != now.get(name)]


def _contents(fingerprint: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """The contents of all files by name."""
    contents: dict[str, list[str | None]] = {}
    for name, content in fingerprint.get("contents", ()):
        contents.setdefault(name, []).append(content)
    return {name: sorted(found, key=str) for name, found in contents.items()}


def require_a_batch(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError if the whole corpus is shorter than one batch."""
    needed = config.train.global_batch_size * (config.data.sequence_length + 1)
    found, bad = 0, []
    for entry in corpus.entries_once():
        if isinstance(entry, BadLine):
            bad.append(entry)
            continue
        found += sum(len(encoded.ids) for encoded in corpus.form.encode([entry], tokenizer)[0])
        if found >= needed:
            return
    if bad and not found:
        other = ". Text under another key needs a card whose `text:` names it (data/README.md)"
        raise UserError(
            f"none of {len(bad):,} lines holds a document. {examples(bad)}"
            + (other if isinstance(corpus.form, RawText) else "")
        )
    if not found:
        keys = "data.files" if corpus.drop is None else "data.files and data.drop"
        raise UserError(f"there is no document in {few(file.name for file in corpus.files)}: look at {keys}")
    raise UserError(
        f"the corpus has {found:,} tokens, fewer than one batch of {needed:,} "
        f"(train.global_batch_size {config.train.global_batch_size} rows of data.sequence_length + 1 = "
        f"{config.data.sequence_length + 1}); give more text in data.files, or lower one of the two"
    )
