"""Information retrieval: BM25 over a folder of texts or a JSON-lines file."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from lamda.config.errors import UserError
from lamda.dialog.tools.passages import LENGTH, Passage, find_files, name_of, read_passages
from lamda.dialog.tools.result import Result
from lamda.durable import sync_file

if TYPE_CHECKING:
    from bm25s import BM25

KEPT_FROM = 1 << 22
"""Bytes of text, about a second's work, from which an index is kept on disk and not made anew each time."""
_FORMAT = 1

_log = logging.getLogger(__name__)


class Retrieval:
    """The tool: the passage that ranks first for a query and, where the query is repeated, the next one."""

    name = "retrieval"

    def __init__(self, passages: Sequence[Passage], index: BM25) -> None:
        """Take passages with their index; `open` reads and makes them."""
        self.passages = passages
        self._index = index

    @classmethod
    def open(cls, corpus: Path) -> Retrieval:
        """Read a corpus and make its index, or load the one that is kept.

        An index of much text is kept in `.lamda-index` in the folder, or beside the file, under a hash of
        the files' names and contents; it appears there whole or not at all.

        Raises UserError where there is no text, where a record is wrong, or where bm25s is not installed.
        """
        contents = _read(find_files(corpus))
        if sum(len(data) for _, data in contents) < KEPT_FROM:
            return cls._made(contents, corpus)
        folder = (corpus if corpus.is_dir() else corpus.parent) / ".lamda-index"
        name = corpus.resolve().name[:40]
        kept = folder / f"{name}-{_digest(contents)}"
        if kept.is_dir():
            return cls._load(kept)
        made = cls._made(contents, corpus)
        made._keep(kept, stale=f"{glob.escape(name)}-" + "?" * 32)
        return made

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The passage at rank `again` (0 is the best) among those that share a word with the query."""
        (words,) = _words([query])
        if not words:
            return []
        scores = self._index.get_scores(words)
        place = int((-scores).argsort(kind="stable")[again]) if again < len(scores) else None
        if place is None or scores[place] <= 0:
            return []
        return [Result(self.passages[place].text, self.passages[place].source)]

    @classmethod
    def _made(cls, contents: Iterable[tuple[Path, bytes]], corpus: Path) -> Retrieval:
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

    def _keep(self, kept: Path, *, stale: str) -> None:
        """Write the index under a temporary name and rename it; others that match `stale` go."""
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
            if not kept.is_dir():  # else another process was faster, and its index is the same
                _log.warning("%s: the index is not kept (%s), and is made again next time", kept, error.strerror)
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
    """The words of each text in small letters, without the commonest English ones."""
    return _bm25().tokenize(texts, return_ids=False, show_progress=False)


def _digest(contents: Iterable[tuple[Path, bytes]]) -> str:
    """A name for all that passages and index follow from."""
    digest = hashlib.sha256(f"{_FORMAT} {LENGTH} {_bm25().__version__}".encode())
    for path, data in contents:
        digest.update(b"\0" + os.fsencode(path) + b"\0" + hashlib.sha256(data).hexdigest().encode())
    return digest.hexdigest()[:32]


def _bm25():  # noqa: ANN202  a module
    try:
        import bm25s
    except ImportError as error:
        raise UserError("retrieval needs bm25s: pip install 'lamda-pytorch[tools]'") from error
    return bm25s
