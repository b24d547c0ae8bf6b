"""A folder or a JSON-lines file as passages, each with the place it was read from."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lamda.config.errors import UserError

TEXT = (".txt", ".md", ".rst", ".py")
RECORDS = ".jsonl"
LENGTH = 500
"""Characters after which a passage ends with its paragraph; one of twice the length is cut."""

_log = logging.getLogger(__name__)

_HEADING = re.compile(r"#{1,6} ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s+")


@dataclass(frozen=True)
class Passage:
    """A text and its source: the record's URL, or `file:line`."""

    text: str
    source: str


def find_files(corpus: Path) -> list[Path]:
    """The file itself, or the readable files of a folder by name.

    What lies in hidden folders is left out, and so is a link that leads there or out of the folder.

    Raises UserError where there is none, or where a folder cannot be read.
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
        _log.warning("--corpus %s: %d links that lead out of it are not read", corpus, len(shown) - len(files))
    if not files:
        wrong = (
            "nothing in it ends in " + ", ".join((*TEXT, RECORDS))
            if corpus.is_dir()
            else "there is no such folder or file"
        )
        raise UserError(f"--corpus {corpus}: {wrong}")
    return files


def _lies_in(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and not _is_hidden(path.relative_to(root))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def name_of(path: Path) -> str:
    """The path as text that UTF-8 can express: bytes of a file's name that are none become U+FFFD."""
    return os.fsencode(path).decode(errors="replace")


def read_passages(path: Path, data: bytes) -> Iterator[Passage]:
    """The passages of a file in order. Raises UserError where a record is none, by file and line.

    Args:
        path: what the source is called, and by its suffix how the file is read.
        data: its bytes; what is not UTF-8 in a text becomes U+FFFD.
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
        raise UserError(f"{place}: no JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{place}: a record needs the field 'text', and may have 'url'")
    url = record.get("url")
    if url is not None and not isinstance(url, str):
        raise UserError(f"{place}: 'url' must be a string")
    for _, text in _cut(record["text"].split("\n"), headings=False):
        yield Passage(text, url or place)


def _cut(lines: Iterable[str], *, headings: bool) -> Iterator[tuple[int, str]]:
    """Paragraphs joined up to `LENGTH`, each with the line that it begins in; a heading begins a new one."""
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
    """The lines as one text, or, where that is longer than two passages, cut after sentences or words.

    Each with the lines before the one that it begins in.
    """
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
