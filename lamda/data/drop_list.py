"""Drop lists: documents that are left out of training, by the hash of their text (`data.drop`, `lamda data clean`).

JSON lines. The first names the files that the list was made of; each other one is an entry: the hash of a text, the
reason, and for a duplicate the place of the document that stays. Whether a document is dropped follows from its own
text and place alone, so it is the same in every lane, rank and epoch.
"""

from __future__ import annotations

import io
import json
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.data.documents import Document
from lamda.data.files import File
from lamda.data.hashing import document_hash

VERSION = 1
NOWHERE = -1


class Entry(NamedTuple):
    """A dropped text. kept: number of a file in the list, and position, of the document that stays for a duplicate.

    If the text of that document is the same, it has the hash of the entry, and is not dropped.
    """

    hash: str
    reason: str
    kept: tuple[int, int] | None = None


class DropList(NamedTuple):
    """A list of a run: its path, and the sha256 of its content. It is small, so that lanes that have it are too."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str) -> DropList:
        """The list at a path. Raises UserError if it cannot be read."""
        return cls(path, sha256(_read(path)).hexdigest())

    def entries(self) -> Entries:
        """Its content, read once per process. Raises UserError if it has changed since `of`, or is no drop list."""
        return _entries(self)


class Entries:
    """The content of a drop list in memory, 20 bytes per entry. reasons: number of entries by reason."""

    def __init__(self, header: dict[str, Any], entries: Iterable[Entry]) -> None:
        self.files: list[list[Any]] = header["files"]
        self.reasons: Counter[str] = Counter()
        hashes, kept_files, kept_positions = array("Q"), array("i"), array("q")
        for entry in entries:
            file, position = (NOWHERE, NOWHERE) if entry.kept is None else entry.kept
            hashes.append(int(entry.hash, 16))
            kept_files.append(file)
            kept_positions.append(position)
            self.reasons[entry.reason] += 1
        self._hashes: NDArray[np.uint64] = np.frombuffer(hashes, np.uint64)
        self._kept_file: NDArray[np.int32] = np.frombuffer(kept_files, np.int32)
        self._kept_position: NDArray[np.int64] = np.frombuffer(kept_positions, np.int64)
        is_known = (self._kept_file >= NOWHERE) & (self._kept_file < len(self.files))
        if (self._hashes[1:] <= self._hashes[:-1]).any() or not is_known.all():
            raise ValueError("not sorted by hash, or without a file")
        self._by_name: dict[str, list[int]] = {}
        for number, (name, *_) in enumerate(self.files):
            self._by_name.setdefault(_last_part(name), []).append(number)

    def __len__(self) -> int:
        return len(self._hashes)

    def number_of(self, url: str) -> int:
        """The number in the list of a file, or NOWHERE."""
        numbers = self._by_name.get(_last_part(url), ())
        return next((number for number in numbers if f"/{url}".endswith(f"/{self.files[number][0]}")), NOWHERE)

    def drops(self, document: Document, file: int) -> bool:
        """Whether to leave out a document of the file with this number."""
        key = int(document_hash(document.text), 16)
        place = bisect_left(self._hashes, key)
        if place == len(self._hashes) or self._hashes[place] != key:
            return False
        return not (self._kept_file[place] == file and self._kept_position[place] == position_of(document))

    def problems(self, files: Iterable[File]) -> Iterator[str]:
        """Why the list does not fit the files of a run: a file that was changed, or one that keeps a document away."""
        found: dict[int, File] = {}
        for file in files:
            number = self.number_of(file.url)
            if number in found and number != NOWHERE:
                yield f"both {found[number].url} and {file.url} are its {self.files[number][0]!r}"
            found[number] = file
        for number in np.unique(self._kept_file[self._kept_file != NOWHERE]).tolist():
            name, size, content = self.files[number]
            if number not in found:
                yield f"it keeps documents of {name!r}, which this run does not read, and drops others like them"
            elif found[number].size != size or content not in (None, _comparable(found[number].content)):
                yield f"{found[number].url} has changed since"


def position_of(document: Document) -> int:
    """Where a document is in its file, the same however the file is cut: its byte, or its number."""
    return document.byte or document.line


def lines_of(header: dict[str, Any], entries: Iterable[Entry]) -> Iterator[bytes]:
    """The lines of a list. header: with `files`, see `file_entries`. entries: sorted by hash, each hash once."""
    # Not orjson: a file name need not be UTF-8.
    yield json.dumps({"drop_list": VERSION, **header}, separators=(",", ":")).encode() + b"\n"
    for entry in entries:
        kept = {} if entry.kept is None else {"kept": entry.kept}
        yield orjson.dumps({"hash": entry.hash, "reason": entry.reason, **kept}) + b"\n"


def file_entries(files: list[File]) -> list[list[Any]]:
    """The files as a list names them: with as much of the path as is unique, size, and content of a local file."""
    counts = Counter(suffix for file in files for suffix in _suffixes(file.url))
    names = [next((suffix for suffix in _suffixes(file.url) if counts[suffix] == 1), file.url) for file in files]
    return [[name, file.size, _comparable(file.content)] for name, file in zip(names, files, strict=True)]


def _suffixes(url: str) -> Iterator[str]:
    parts = url.split("/")
    return ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))


def _last_part(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _comparable(content: str | None) -> str | None:
    """The identity of a local file; the tag of a server changes where the text does not."""
    return content if content is not None and content.startswith("sample ") else None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"data.drop {path}: cannot be read ({error.strerror})") from error


@cache
def _entries(drop: DropList) -> Entries:
    content = _read(drop.path)
    if sha256(content).hexdigest() != drop.sha256:
        raise UserError(f"data.drop {drop.path}: has changed since the run started, or is another file on this machine")
    lines = io.BytesIO(content)
    try:
        header = json.loads(lines.readline())
        files = [[type(value) for value in file] for file in header["files"]]
        if header["drop_list"] != VERSION or not all(len(file) == 3 and file[:2] == [str, int] for file in files):
            raise ValueError(header)
        return Entries(header, map(_entry, lines))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"data.drop {drop.path}: is no drop list of this version; `lamda data clean FILES --to LIST` writes one"
        ) from error


def _entry(line: bytes) -> Entry:
    values = orjson.loads(line)
    file, position = dict.get(values, "kept", (NOWHERE, NOWHERE))  # TypeError if it is no object
    return Entry(values["hash"], values["reason"], (file, position))
