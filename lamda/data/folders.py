"""The files in a folder that a run names, and what is left out of them, by reason."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from lamda.config.errors import DataError, UserError
from lamda.console import one_line
from lamda.data.archives import unread_members
from lamda.data.card import Source
from lamda.data.documents import Form
from lamda.data.encodings import SAMPLE, encoding_of, encoding_of_lines
from lamda.data.file_formats import suffix_of
from lamda.data.files import File, chunks_of
from lamda.data.inflate import joined, sampled
from lamda.data.lanes import why_unread
from lamda.data.partitioning import whole_lane
from lamda.data.sections import SECTIONED_FROM

RUN_FILES = {"status.json", "tokenizer.model"}
"""A folder with one of these is a run or a model: its text is not data, and changes while the run trains."""

READ_WHOLE = 1 << 20
"""Stored bytes up to which a compressed file or an archive is read to its end at the start, to find damage."""


@dataclass
class LeftOut:
    """The number of files that are left out by reason, with the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, reason: str) -> None:
        """Count a file. Files are counted by the reason without what is in parentheses, which may differ in each."""
        kind = reason.partition(" (")[0].partition(";")[0]
        self.counts[kind] += 1
        self.first.setdefault(kind, path if kind == reason else f"{path}: {reason.removeprefix(kind).strip(' ;()')}")

    def add_unknown(self, path: str) -> None:
        """Count a file of a kind that holds no text, or that has no suffix."""
        self.add(path, suffix_of(path) or "without a suffix")

    def add_members(self, file: File) -> None:
        """Count such files in an archive, unless it has to be decompressed for that and is large."""
        if file.records == "zip" or (file.records == "tar" and file.size <= READ_WHOLE):
            for name in unread_members(file):
                self.add_unknown(f"{file.url}/{name}")

    def __str__(self) -> str:
        parts = [
            f"{count:,} {reason} ({one_line(self.first[reason])})" for reason, count in self.counts.most_common(12)
        ]
        return "; ".join([*parts, *(["..."] if len(self.counts) > 12 else [])])


def walk(folder: str, left_out: LeftOut) -> Iterator[str]:
    """The files in a folder and those below it, without hidden ones. Links are followed, each folder is read once."""
    seen: set[tuple[int, int]] = set()
    unreadable: list[OSError] = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable.append):
        state = Path(root).stat()
        if (state.st_dev, state.st_ino) in seen or (root != folder and RUN_FILES.intersection(names)):
            if (state.st_dev, state.st_ino) not in seen:
                left_out.add(root, "folders of a run or model")
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (os.path.join(root, name) for name in sorted(names) if not name.startswith("."))  # noqa: PTH118
    for error in unreadable:
        left_out.add(str(error.filename), f"unreadable folders, {error.strerror}")


def is_special(path: str) -> bool:
    """Whether a path is neither a file nor a link: a pipe would wait for a writer forever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return False
    return not stat.S_ISREG(mode)


def described(file: File, *, whole_texts: bool) -> File:
    """The file with the encoding of its text, and whether it is read in sections. Raises DataError if it is not text.

    whole_texts: read as versions before sections and encodings did.
    """
    if whole_texts or file.records in ("rows", "batches", "zip", "tar"):
        return file
    file = replace(file, is_sectioned=file.records == "document" and file.size > SECTIONED_FROM)
    return file if file.is_remote else replace(file, encoding=_encoding(file))


def _encoding(file: File) -> str | None:
    with closing(chunks_of(file)) as chunks:
        sample = joined(sampled(chunks)[0])[:SAMPLE]
    if file.records in ("lines", "json", "table"):
        return encoding_of_lines(sample)
    try:
        return encoding_of(sample)
    except ValueError as error:
        raise DataError(f"{file.url}: {error}") from error


def problem_of(file: File, source: Source, form: Form) -> str | None:
    """Why a file holds no text for this source, or None. Compressed files and archives are read whole if short."""
    is_whole = file.size <= READ_WHOLE and (file.is_compressed or file.records in ("zip", "tar", "json"))
    try:
        return why_unread(whole_lane(source, file, form=form), is_whole=is_whole)
    except (DataError, UserError) as error:
        return str(error).removeprefix(f"{file.url}: ")
