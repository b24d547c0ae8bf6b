"""Records: what an audit keeps of each document, a fixed number of bytes, on disk. A folder of them is a shard.

SHARD/summary.json  counts and examples, the files of the whole corpus, the options
SHARD/documents     DOCUMENT records
SHARD/beginnings    [documents] S80, UTF-8, for examples
SHARD/signatures    [documents, SIGNATURE] uint32, the MinHash signatures
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.durable import sync_file, sync_folder, write_file

SIGNATURE = 128
"""Numbers of a MinHash signature: the standard error of an estimated similarity of 0.8 is 0.035."""

BEGINNING = np.dtype("S80")

OVERLAP, EMPTY, PII, SIGNED = 1, 2, 4, 8
"""Flags: shares an n-gram with evaluation text; has no letter or digit; has strings like personal data; is signed."""

DOCUMENT = np.dtype(
    [("file", "<i4"), ("line", "<i8"), ("byte", "<i8"), ("hash", "<u8"), ("size", "<i8"), ("flags", "u1")]
)
"""A document. file: number in the whole corpus. line, byte: in the file, from 0. size: bytes of UTF-8."""

VERSION = 1
SUMMARY = "summary.json"
PARTS = {"documents": DOCUMENT, "beginnings": BEGINNING, "signatures": np.dtype((np.uint32, SIGNATURE))}
"""The files of a shard, and what each has of a document; without near duplicates `signatures` is empty."""
BYTES_ON_DISK = sum(kind.itemsize for kind in PARTS.values())


class Writer:
    """Writes a shard into a hidden folder, which becomes `target` when complete. Use it as a context manager."""

    def __init__(self, target: Path) -> None:
        self._target = target
        require_new(target)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        except OSError as error:
            raise UserError(f"{target}: cannot be created ({error.strerror})") from error
        self._files = [(self.folder / name).open("wb") for name in PARTS]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._files:
            with suppress(OSError):  # a full disk, which was reported
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, *parts: NDArray[Any]) -> None:
        """Append documents: an array of [n] or [n, width] for each of PARTS. Raises UserError if the disk is full."""
        with self._full_disk():
            for stream, part in zip(self._files, parts, strict=True):
                stream.write(part.tobytes())

    def finish(self, summary: dict[str, Any]) -> None:
        """Make the shard complete. Raises UserError if the disk is full, or another shard came first."""
        with self._full_disk():
            for stream in self._files:
                stream.close()
                sync_file(Path(stream.name))
            write_file(self.folder / SUMMARY, json.dumps({"version": VERSION, **summary}))
            self.folder.chmod(0o755)
            try:
                self.folder.rename(self._target)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    require_new(self._target)
                raise
            sync_folder(self._target.parent)

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); an audit keeps {BYTES_ON_DISK} bytes per "
                "document; TMPDIR names another disk, or --to with --shard"
            ) from error


def require_new(target: Path) -> None:
    """Raise UserError if there is a file or a folder, which is not overwritten, or no folder to write it in."""
    if target.exists():
        raise UserError(f"{target} exists already; name another one, or remove it")
    require_folder(target)


def require_folder(target: Path) -> None:
    """Raise UserError if the folder of a file is missing: before the work, not after it."""
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")


@dataclass(frozen=True)
class Shards:
    """All shards of a corpus. documents: [n] DOCUMENT, in the order of file and place."""

    summaries: list[dict[str, Any]]
    documents: NDArray[np.void]
    _stored: dict[str, list[NDArray[Any]]]
    _at: NDArray[np.int64]

    @classmethod
    def read(cls, folders: Sequence[Path], *, memory: int) -> Shards:
        """Shards that together are the whole corpus. Raises UserError for others, or if they need more memory."""
        summaries = [_summary(folder) for folder in folders]
        _require_whole(folders, summaries)
        require_memory(sum(summary["documents"] for summary in summaries), memory)
        stored = {name: [_mapped(folder / name, kind) for folder in folders] for name, kind in PARTS.items()}
        documents = np.concatenate(stored["documents"])
        at = np.lexsort((documents["line"], documents["byte"], documents["file"]))
        return cls(summaries, documents[at], stored, at)

    def beginning(self, number: int) -> str:
        """The beginning of a document."""
        return bytes(self._take("beginnings", np.array([number]))[0]).decode("utf-8", "ignore")

    def signatures(self, numbers: NDArray[np.int64], columns: slice = slice(None)) -> NDArray[np.uint32]:
        """The signatures of documents, or columns of them."""
        return self._take("signatures", numbers, (slice(None), columns))

    def _take(self, name: str, numbers: NDArray[np.int64], part: Any = ...) -> NDArray[Any]:
        """What one file of the shards has of documents."""
        at, begin = self._at[numbers], 0
        found = None
        for lengths, stored in zip(self._stored["documents"], self._stored[name], strict=True):
            is_here = (at >= begin) & (at < begin + len(lengths))
            values = stored[part][at[is_here] - begin] if len(stored) else stored[part][:0]
            if found is None:
                found = np.zeros((len(numbers), *values.shape[1:]), values.dtype)
            found[is_here] = values
            begin += len(lengths)
        assert found is not None  # there is a shard
        return found


BYTES_PER_DOCUMENT = 160
"""Memory that finding duplicates takes, beside some 30 MB: the documents twice, and arrays of one number for each."""


def require_memory(documents: int, memory: int) -> None:
    """Raise UserError if so many documents need more than `memory` bytes."""
    if documents * BYTES_PER_DOCUMENT > memory:
        raise UserError(
            f"--memory {memory / 1e9:g}: {documents:,} documents need {documents * BYTES_PER_DOCUMENT / 1e9:.2g} GB "
            f"({BYTES_PER_DOCUMENT} bytes each) to find duplicates among them; raise --memory, or audit the sources "
            "one by one"
        )


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A file of a shard, memory-mapped; an empty file cannot be."""
    if not path.stat().st_size:
        return np.zeros(0, kind)
    data = np.memmap(path, np.uint8, "r")
    return data.view(kind.base).reshape(-1, *kind.shape)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text("utf-8"))
        if summary["version"] != VERSION:
            raise ValueError(f"version {summary['version']}")
        for name, kind in PARTS.items():
            size = (folder / name).stat().st_size
            if size != summary["documents"] * kind.itemsize and not (name == "signatures" and size == 0):
                raise ValueError(f"{name} has {size} bytes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: is no shard of an audit ({reason}); `--shard I/N --to FOLDER` writes one"
        ) from error
    return summary


def _require_whole(folders: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> None:
    for folder, summary in zip(folders, summaries, strict=True):
        for name in ("files", "options"):
            if summary[name] != summaries[0][name]:
                raise UserError(f"{folder}: its {name} are not those of {folders[0]}; audit both in the same way")
    total, found = summaries[0]["shard"][1], sorted(summary["shard"][0] for summary in summaries)
    if found != list(range(1, total + 1)):
        raise UserError(f"the shards are {', '.join(map(str, found))} of {total}; give each of 1 to {total} once")
