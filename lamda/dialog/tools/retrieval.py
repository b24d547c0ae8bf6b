"""Information retrieval: BM25 over passages of a folder of texts or of a JSON-lines file."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import orjson

from lamda.config.errors import UserError
from lamda.dialog.tools.result import Result
from lamda.durable import sync_file

if TYPE_CHECKING:
    from bm25s import BM25

CACHE_FROM = 1 << 22
"""Bytes of text, about a second's work, from which the index is cached on disk."""
_FORMAT = 1
TEXT = (".txt", ".md", ".rst", ".py")
RECORDS = ".jsonl"
LENGTH = 500
"""Characters after which a passage ends with its paragraph; one of twice the length is split."""

_HEADING = re.compile(r"#{1,6} ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s+")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passage:
    """A text and its source: the record's URL, or `file:line`."""

    text: str
    source: str


def find_files(corpus: Path) -> list[Path]:
    """The file itself, or the readable files of a folder, sorted. Raises UserError if there are none.

    Hidden folders are left out, and so are links that lead there or out of the folder.
    """
    if corpus.is_file():
        if corpus.suffix in (*TEXT, RECORDS):
            return [corpus]
        raise UserError(f"--corpus {corpus}: cannot be searched; files end in {', '.join((*TEXT, RECORDS))}")
    try:
        named = sorted(path for path in corpus.rglob("*") if path.suffix in (*TEXT, RECORDS) and path.is_file())
    except OSError as error:
        raise UserError(f"--corpus {corpus}: cannot be read ({error})") from error
    shown = [path for path in named if not _is_hidden(path.relative_to(corpus))]
    root = corpus.resolve()
    files = [path for path in shown if _lies_in(path.resolve(), root)]
    if len(files) < len(shown):
        _log.warning("--corpus %s: %d links that lead out of it are skipped", corpus, len(shown) - len(files))
    if not files:
        nothing = f"nothing in it ends in {', '.join((*TEXT, RECORDS))}"
        raise UserError(f"--corpus {corpus}: {nothing if corpus.is_dir() else 'there is no such folder or file'}")
    return files


def _lies_in(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and not _is_hidden(path.relative_to(root))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def name_of(path: Path) -> str:
    """The path as valid UTF-8: invalid bytes of a file name become U+FFFD."""
    return os.fsencode(path).decode(errors="replace")


def read_passages(path: Path, data: bytes) -> Iterator[Passage]:
    """The passages of a file in order. Raises UserError for an invalid record, with file and line.

    The path names the source, and its suffix selects the format. Invalid UTF-8 in a text becomes U+FFFD.
    """
    name = name_of(path)
    if path.suffix == RECORDS:
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield from _record(line, f"{name}:{number}")
        return
    for number, text in _cut(data.decode(errors="replace").split("\n"), headings=path.suffix == ".md"):
        yield Passage(text, f"{name}:{number}")


def _record(line: bytes, place: str) -> Iterator[Passage]:
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{place}: a record needs the field 'text', and may have 'url'")
    url = record.get("url")
    if url is not None and not isinstance(url, str):
        raise UserError(f"{place}: 'url' must be a string")
    for _, text in _cut(record["text"].split("\n"), headings=False):
        yield Passage(text, url or place)


def _cut(lines: Iterable[str], *, headings: bool) -> Iterator[tuple[int, str]]:
    """Paragraphs joined up to `LENGTH`, each with the number of its first line; a heading begins a new one."""
    begun: list[str] = []
    first = length = 0
    for number, line in enumerate(lines, 1):
        ends = length >= LENGTH and not line.strip()
        if begun and (ends or length >= 2 * LENGTH or (headings and _HEADING.match(line))):
            yield from ((first + before, text) for before, text in _short(begun))
            begun, length = [], 0
        if line.strip() or begun:
            first = first if begun else number
            begun.append(line.rstrip())
            length += len(line)
    yield from ((first + before, text) for before, text in _short(begun))


def _short(lines: list[str]) -> Iterator[tuple[int, str]]:
    """The text of the lines, split after sentences or words if long; each part with the number of lines before it."""
    text, start = "\n".join(lines).rstrip(), 0
    while start < len(text):
        stop = len(text)
        if stop - start > 2 * LENGTH:
            breaks = [found.start() for found in _SENTENCE_END.finditer(text, start + LENGTH, start + 2 * LENGTH)]
            sentences = [place for place in breaks if text[place - 1] in ".!?"]
            stop = (sentences or breaks or [start + 2 * LENGTH])[0 if sentences else -1]
        piece = text[start:stop].lstrip()
        yield text.count("\n", 0, stop - len(piece)), piece.rstrip()
        start = stop


class Retrieval:
    """The tool: the top passage for a query, and the next in rank each time the query is repeated."""

    name = "retrieval"

    def __init__(self, passages: Sequence[Passage], index: BM25) -> None:
        self.passages, self._index = passages, index

    @classmethod
    def open(cls, corpus: Path) -> Retrieval:
        """Read a corpus and build its index; that of a large corpus is cached in `.lamda-index` there.

        Its name has a hash of the files' names and contents; it is written atomically. Raises UserError if there is
        no text, a record is invalid, or bm25s is not installed.
        """
        contents = _read(find_files(corpus))
        if sum(len(data) for _, data in contents) < CACHE_FROM:
            return cls._build(contents, corpus)
        folder = (corpus if corpus.is_dir() else corpus.parent) / ".lamda-index"
        name = corpus.resolve().name[:40]
        kept = folder / f"{name}-{_digest(contents)}"
        if kept.is_dir():
            return cls._load(kept)
        built = cls._build(contents, corpus)
        built._save(kept, stale=f"{glob.escape(name)}-" + "?" * 32)
        return built

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The passage at rank `again`, from 0, among those that share a word with the query."""
        (words,) = _words([query])
        if not words:
            return []
        scores = self._index.get_scores(words)
        place = int((-scores).argsort(kind="stable")[again]) if again < len(scores) else None
        if place is None or scores[place] <= 0:
            return []
        return [Result(self.passages[place].text, self.passages[place].source)]

    @classmethod
    def _build(cls, contents: Iterable[tuple[Path, bytes]], corpus: Path) -> Retrieval:
        passages = [passage for path, data in contents for passage in read_passages(path, data)]
        words = _words([passage.text for passage in passages])
        if not any(words):
            raise UserError(f"--corpus {corpus}: its files hold no words")
        index = _bm25().BM25()
        index.index(words, show_progress=False)
        return cls(passages, index)

    @classmethod
    def _load(cls, kept: Path) -> Retrieval:
        try:
            index = _bm25().BM25.load(kept, mmap=True, verbosity=0)
            lines = (kept / "passages.jsonl").read_bytes().splitlines()
            passages = [Passage(*orjson.loads(line)) for line in lines]
            if len(passages) != index.scores["num_docs"]:
                raise ValueError(f"{len(passages)} passages for an index of {index.scores['num_docs']}")
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise UserError(f"{kept}: cannot be read ({error}); remove it, and it is made again") from error
        return cls(passages, index)

    def _save(self, kept: Path, *, stale: str) -> None:
        """Write the index under a temporary name and rename it; remove others that match `stale`."""
        try:
            kept.parent.mkdir(exist_ok=True)
            written = Path(tempfile.mkdtemp(dir=kept.parent, prefix="unfinished-"))
            try:
                self._index.save(written, show_progress=False)
                lines = (orjson.dumps([passage.text, passage.source]) + b"\n" for passage in self.passages)
                (written / "passages.jsonl").write_bytes(b"".join(lines))
                for path in written.iterdir():
                    sync_file(path)
                written.rename(kept)
            finally:
                shutil.rmtree(written, ignore_errors=True)
        except OSError as error:
            if not kept.is_dir():  # else another process wrote the same index
                _log.warning("%s: the index is not cached (%s) and will be rebuilt next time", kept, error.strerror)
            return
        for other in kept.parent.glob(stale):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)


def _read(files: Iterable[Path]) -> list[tuple[Path, bytes]]:
    contents = []
    for path in files:
        try:
            contents.append((path, path.read_bytes()))
        except OSError as error:
            raise UserError(f"--corpus: {name_of(path)}: cannot be read ({error.strerror})") from error
    return contents


def _words(texts: list[str]) -> list[list[str]]:
    """The words of each text in lower case, without English stop words."""
    return _bm25().tokenize(texts, return_ids=False, show_progress=False)


def _digest(contents: Iterable[tuple[Path, bytes]]) -> str:
    """A hash of everything that determines passages and index."""
    digest = hashlib.sha256(f"{_FORMAT} {LENGTH} {_bm25().__version__}".encode())
    for path, data in contents:
        digest.update(b"\0" + os.fsencode(path) + b"\0" + hashlib.sha256(data).hexdigest().encode())
    return digest.hexdigest()[:32]


def _bm25() -> ModuleType:
    try:
        import bm25s
    except ImportError as error:
        raise UserError("retrieval needs bm25s: pip install 'lamda-pytorch[tools]'") from error
    return bm25s
