"""Held-out text of a run without any: a share of its documents, by a hash of their text, that training leaves out.

The documents are chosen when a run starts and kept in RUN/data/held_out.jsonl. Every document of the same text is left
out, so a duplicate does not bring it back.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lamda.config.errors import DataError, UserError
from lamda.config.schema import Config
from lamda.console import Progress
from lamda.data.card import Source, load_card
from lamda.data.corpus import Corpus, open_corpus
from lamda.data.documents import Document, Form, RawText
from lamda.data.files import no_op
from lamda.data.hashing import document_hash
from lamda.data.lanes import RAW_TEXT, Cursor
from lamda.durable import replace_file

LEAST, MOST = 64_000, 32_000_000
"""Bytes of text to hold out: of a small and of a large corpus."""

MOST_SHARE = 0.1
"""Share of a corpus that is held out at most."""

SCANNED = 1 << 30
"""Bytes of text, the same number of each lane, from which documents are chosen."""

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """The documents that a run holds out, by hash, and their bytes."""

    hashes: frozenset[str]
    utf8_bytes: int

    @property
    def identity(self) -> list[int | str]:
        """The entry of a fingerprint: the number of documents, and a hash of them."""
        return [len(self.hashes), sha256("".join(sorted(self.hashes)).encode()).hexdigest()[:32]]


def open_text(
    config: Config,
    *,
    form: Form = RAW_TEXT,
    saved: Mapping[str, Any] | None = None,
    first: Config | None = None,
    is_current: bool = True,
    on_wait: Callable[[], object] = no_op,
    progress: Callable[[], object] = no_op,
) -> Corpus:
    """The corpus of a run or of a stage; if the run has no validation text, without the documents that it holds out.

    saved: the fingerprint of the checkpoint that the run resumes from, whose rules hold: runs of earlier versions hold
    out nothing. first: the first stage of the run, from whose text the documents are chosen; default: this is it.
    is_current: whether the checkpoint is of this stage. progress: called while text is read. Raises UserError, as for
    `open_corpus`.
    """
    is_resumed, saved, first = bool(saved), saved or {}, first or config
    is_whole = is_current and is_resumed and "texts" not in saved
    corpus = open_corpus(config.data, form=form, on_wait=on_wait, whole_texts=is_whole)
    has_split = "held_out" in saved if is_resumed else config.data.held_out > 0
    if load_card(first.data).validation or not has_split:
        return corpus
    file, is_first = held_out_file(Path(config.run.dir)), first.data == config.data
    split = None if is_first and not is_resumed else _kept(file, form)
    if split is None or saved.get("held_out", split.identity) != split.identity:
        origin = corpus if is_first else open_corpus(first.data, form=form, on_wait=on_wait)
        chosen = _choose(origin, config.data.held_out, progress)
        if not chosen:
            file.unlink(missing_ok=True)  # of a start with other text
            return corpus
        split = _keep(chosen, file, form)
    if is_current:
        size = f"{split.utf8_bytes / 1e6:.3g} MB"
        log.info("held out of training: %s documents, %s (in %s)", f"{len(split.hashes):,}", size, file)
    lanes = tuple(replace(lane, held_out=split.hashes) for lane in corpus.lanes)
    card = corpus.card.model_copy(update={"validation": (_source(file, form),)})
    return replace(corpus, card=card, lanes=lanes, held_out=split.identity)


def held_out_file(run: Path) -> Path:
    """Where a run keeps its held-out documents."""
    return run / "data" / "held_out.jsonl"


def held_out_source(run: Path, fingerprint: Mapping[str, Any], form: Form = RAW_TEXT) -> Source | None:
    """The held-out text of a run, if the fingerprint of its checkpoint says that it has some.

    Raises UserError if it is missing or another.
    """
    if "held_out" not in fingerprint:
        return None
    split = _kept(held_out_file(run), form)
    if split is None or split.identity != fingerprint["held_out"]:
        state = "is missing or damaged" if split is None else "is not that of the checkpoint"
        raise UserError(f"{held_out_file(run)}: the run's held-out text {state}; give --files")
    return _source(held_out_file(run), form)


def _source(file: Path, form: Form) -> Source:
    domain = "domain" if isinstance(form, RawText) else None
    return Source(name="held_out", license="not stated", files=(str(file),), domain=domain)


def _choose(corpus: Corpus, share: float, progress: Callable[[], object]) -> list[Document]:
    """The documents with the lowest hashes, up to the share of the text: a pure function of the two.

    What training loses is at most MOST_SHARE of the text, all copies of a document counted.
    """
    heap: list[tuple[int, str, Document, int]] = []  # the highest hash first
    copies: dict[str, int] = {}  # bytes of all documents of a text that was among the lowest
    scanned = held = 0
    for size, document in _scan(corpus):
        progress()
        scanned += size
        key = document_hash(document.text)
        if key in copies:
            copies[key] += size
            continue
        if not 0 < size <= MOST // 10 or (held > MOST and int(key, 16) > -heap[0][0]):
            continue
        copies[key] = size
        heapq.heappush(heap, (-int(key, 16), key, document, size))
        held += size
        while held - heap[0][3] > MOST:
            *_, size = heapq.heappop(heap)
            held -= size
    total = max(scanned, sum(lane.axis_length for lane in corpus.lanes) if scanned >= SCANNED else 0)
    most = min(MOST, int(total * MOST_SHARE))
    wanted, chosen, length, lost = min(most, max(LEAST, int(total * share))), list[Document](), 0, 0
    for _, key, document, size in sorted(heap, reverse=True):
        if length < wanted and lost + copies[key] <= most:
            chosen.append(document)
            length, lost = length + size, lost + copies[key]
    if scanned and not chosen:
        log.warning("no text is held out: no document, with its copies, is at most a tenth of it; see data.eval_files")
    return chosen


def _scan(corpus: Corpus) -> Iterator[tuple[int, Document]]:
    """The first documents of each lane with their bytes, up to SCANNED bytes of all lanes."""
    each = SCANNED // len(corpus.lanes)
    total = min(SCANNED, sum(lane.axis_length for lane in corpus.lanes))
    with Progress("choosing held-out text", total=total, unit="bytes") as shown:
        for lane in corpus.lanes:
            left = each
            with closing(lane.read(Cursor())) as entries:
                for entry in entries:
                    if isinstance(entry, Document):
                        size = len(entry.text.encode())
                        yield size, entry
                        shown.advance(size)
                        left -= size
                        if left <= 0:
                            break


def _keep(documents: list[Document], file: Path, form: Form) -> Split:
    """Write the documents. A conversation is its own record."""
    lines = [
        orjson.dumps({"text": each.text, "domain": each.domain}) if isinstance(form, RawText) else each.text.encode()
        for each in documents
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, b"".join(line + b"\n" for line in lines))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); free some space, or use another run.dir"
        ) from error
    return _split(document.text for document in documents)


def _kept(file: Path, form: Form) -> Split | None:
    """The documents in a file that `_keep` wrote; None if they cannot be read."""
    try:
        lines = file.read_bytes().splitlines()
        return _split(orjson.loads(line)["text"] if isinstance(form, RawText) else line.decode() for line in lines)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def _split(texts: Iterator[str]) -> Split:
    sizes = {document_hash(text): len(text.encode()) for text in texts}
    return Split(frozenset(sizes), sum(sizes.values()))
