"""Ready blocks: what a lane has made once is kept, mapped into memory, and never made again.

A folder holds, for each lane, files of consecutive blocks: `lane-0003/00000128-00000192.blocks`. A file is
written under a temporary name and renamed when it is whole, so that every file there is complete; each
block in it has a checksum, and the index says which lane of which fingerprint they are of. Two writers of the
same blocks write the same bytes. A writer locks its temporary file (`flock`), so that the next one in its folder
deletes what a killed one left.

    file = block data | index (JSON) | length of the index, 8 bytes | sha256 of the index, 32 bytes | MAGIC
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lamda.best_effort import reason_of
from lamda.config.errors import UserError
from lamda.data.blocks import RUN, Block, Packing, read_blocks
from lamda.data.documents import Document
from lamda.data.errors import DataError
from lamda.data.lanes import Cursor, Lane
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer
from lamda.durable import replace_file

MAGIC = b"LAMDABLK"
GROUP = 64
"""A file ends at a multiple of this many blocks."""

_NAME = re.compile(r"(\d+)-(\d+)\.blocks")

DOCUMENT = np.dtype([("epoch", "<i4"), ("file", "<i4"), ("line", "<i8"), ("byte", "<i8"), ("domain", "<i4")])


@dataclass(frozen=True)
class BlockFolder:
    """The blocks of one fingerprint under `data.blocks`.

    keeping: entered around everything that is done with the folder; an OSError there is its matter.
    """

    path: Path
    keeping: AbstractContextManager[object]

    @classmethod
    def of(
        cls, folder: str, fingerprint: dict[str, Any], *, keeping: AbstractContextManager[object] | None = None
    ) -> BlockFolder:
        """The part of `folder` for everything that blocks depend on: the fingerprint but for the weights.

        keeping: what an OSError of the folder means; by default a UserError.
        """
        parts = {key: value for key, value in fingerprint.items() if key != "weights"}
        name = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        path, keeping = Path(folder) / name, keeping or _Demanded(folder)
        with keeping:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "fingerprint.json").exists():
                replace_file(path / "fingerprint.json", json.dumps(fingerprint, indent=1))
        return cls(path, keeping)

    def blocks(
        self, lane: Lane, cursor: Cursor, *, packing: Packing, tokenizer: Tokenizer
    ) -> Generator[tuple[Block, Cursor]]:
        """As `read_blocks`; ready blocks are mapped, the others made and kept."""
        while True:
            found: Iterator[tuple[Block, Cursor]] | None = None
            with self.keeping:
                file = self._file_with(lane.index, cursor.block)
                found = file.read_from(cursor.block) if file else None
            for block, after in found or self._make(lane, cursor, packing, tokenizer):
                yield block, after
                cursor = after

    def ready_until(self, lane: int, number: int) -> int:
        """The first block from `number` on that is not ready."""
        while file := self._file_with(lane, number):
            number = file.stop
        return number

    def cursor_at(self, lane: int, number: int) -> Cursor:
        """Where block `number` begins, the block before it being ready (or `number` 0)."""
        if number == 0:
            return Cursor()
        file = self._file_with(lane, number - 1)
        assert file is not None, "the caller made sure that it is ready"
        return next(after for _, after in file.read_from(number - 1))

    def _lane(self, lane: int) -> Path:
        return self.path / f"lane-{lane:04}"

    def _file_with(self, lane: int, number: int) -> _BlockFile | None:
        for path in sorted(self._lane(lane).glob("*.blocks")):
            found = _NAME.fullmatch(path.name)
            if found and int(found[1]) <= number < int(found[2]):
                return _BlockFile(path, int(found[1]), int(found[2]))
        return None

    def _make(
        self, lane: Lane, cursor: Cursor, packing: Packing, tokenizer: Tokenizer
    ) -> Iterator[tuple[Block, Cursor]]:
        """Make blocks to the end of a file, or until nobody asks for more; keep them in either case."""
        writer = _Writer(self._lane(lane.index), cursor.block, narrow=tokenizer.vocab_size <= 1 << 16)
        try:
            for block, after in read_blocks(lane, cursor, packing=packing, tokenizer=tokenizer):
                with self.keeping:
                    writer.add(block, after)
                yield block, after
                if after.block % GROUP == 0:
                    return
        finally:
            with self.keeping:
                writer.close()


@dataclass(frozen=True)
class _Demanded:
    """The folder is what is wanted: without it, nothing goes on."""

    folder: str

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, OSError):
            raise UserError(
                f"data.blocks {self.folder}: cannot be read or written ({reason_of(value)}); what is complete there "
                "stays, and the same command continues"
            ) from value


@dataclass(frozen=True)
class _BlockFile:
    path: Path
    start: int
    stop: int

    def read_from(self, number: int) -> Iterator[tuple[Block, Cursor]]:
        """Blocks from `number` to the end of the file. Raises DataError where the file is damaged, OSError now."""
        if self.path.stat().st_size == 0:  # which cannot be mapped
            raise self._damaged()
        data = np.memmap(self.path, np.uint8, mode="r")
        index = self._index(data)
        entries = [entry for entry in index["blocks"] if entry["number"] >= number]
        return (self._block(data, entry, index["domains"]) for entry in entries)

    def _index(self, data: NDArray[np.uint8]) -> dict[str, Any]:
        if len(data) < 48 or data[-8:].tobytes() != MAGIC:
            raise self._damaged()
        length = int.from_bytes(data[-48:-40].tobytes(), "little")
        content = data[max(0, len(data) - 48 - length) : -48].tobytes()
        if sha256(content).digest() != data[-40:-8].tobytes():
            raise self._damaged()
        index: dict[str, Any] = json.loads(content)
        place = index.get("place") or _place(self.path.parent)  # files of earlier versions do not say it
        if place != _place(self.path.parent) or [each["number"] for each in index["blocks"]] != list(
            range(self.start, self.stop)
        ):
            raise DataError(
                f"{self.path}: holds other blocks than its name says (of {place}); was it moved here? Delete it, and "
                "its blocks are made again"
            )
        return index

    def _block(self, data: NDArray[np.uint8], entry: dict[str, Any], domains: list[str]) -> tuple[Block, Cursor]:
        part = data[entry["start"] : entry["start"] + entry["length"]]
        if sha256(part.data).hexdigest() != entry["sha256"]:
            raise self._damaged()
        arrays = {}
        for name, (dtype, shape, start) in entry["arrays"].items():
            kind = {"RUN": RUN, "DOCUMENT": DOCUMENT}.get(dtype) or np.dtype(dtype)
            arrays[name] = np.frombuffer(part, kind, int(np.prod(shape)), start).reshape(shape)
        documents = tuple(
            Document(
                text="",
                domain=domains[row["domain"]],
                epoch=int(row["epoch"]),
                file=int(row["file"]),
                line=int(row["line"]),
                byte=int(row["byte"]),
            )
            for row in arrays["documents"]
        )
        block = Block(
            entry["number"],
            arrays["ids"].astype(np.uint32, copy=False),
            arrays["runs"],
            documents,
            tuple(BadLine(*bad) for bad in entry["quarantined"]),
            arrays.get("loss_mask"),
        )
        return block, Cursor(**entry["after"])

    def _damaged(self) -> DataError:
        return DataError(f"{self.path}: damaged; delete it, and its blocks are made again")


class _Writer:
    """Writes a file of consecutive blocks; it appears when `close` is called, unless anything failed before."""

    def __init__(self, folder: Path, start: int, *, narrow: bool) -> None:
        self._folder, self._start, self._narrow = folder, start, narrow
        self._entries: list[dict[str, Any]] = []
        self._domains: dict[str, int] = {}
        self._stream: IO[bytes] | None = None
        self._has_failed = False
        self._temporary = folder / f".{start:08}-{os.getpid()}-{os.urandom(4).hex()}.tmp"

    def add(self, block: Block, after: Cursor) -> None:
        """Append a block and the cursor of the next. Raises OSError once; what comes after that is dropped."""
        if self._has_failed:
            return
        try:
            if self._stream is None:
                self._stream = self._open()
            self._stream.write(self._entry_of(block, after, start=self._stream.tell()))
        except OSError:
            self._give_up()
            raise

    def close(self) -> None:
        """Bring what was added to the disk, under its final name. Raises OSError."""
        if self._stream is None:
            return
        content = {"place": _place(self._folder), "domains": list(self._domains), "blocks": self._entries}
        index = json.dumps(content).encode()
        try:
            self._stream.write(index + len(index).to_bytes(8, "little") + sha256(index).digest() + MAGIC)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            stop = self._start + len(self._entries)
            self._temporary.replace(self._folder / f"{self._start:08}-{stop:08}.blocks")
            self._stream.close()
            self._stream = None
        except OSError:
            self._give_up()
            raise

    def _open(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".*.tmp"):
            _delete_if_abandoned(leftover)
        stream = self._temporary.open("wb")
        with suppress(OSError):  # a file system without locks: there nobody takes the file for abandoned
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return stream

    def _give_up(self) -> None:
        self._has_failed, stream, self._stream = True, self._stream, None
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes what is still buffered
            if stream is not None:
                stream.close()

    def _entry_of(self, block: Block, after: Cursor, *, start: int) -> bytes:
        """A block's data, which lies at `start`; the index gets its entry."""
        arrays = {"ids": block.ids.astype("<u2" if self._narrow else "<u4"), "runs": block.runs}
        arrays["documents"] = self._documents(block.documents)
        if block.loss_mask is not None:
            arrays["loss_mask"] = block.loss_mask
        places, parts, size = {}, [], 0
        for name, array in arrays.items():
            kind = {RUN: "RUN", DOCUMENT: "DOCUMENT"}.get(array.dtype, array.dtype.str)
            places[name] = (kind, array.shape, size)
            parts.append(array.tobytes() + b"\0" * (-array.nbytes % 8))
            size += len(parts[-1])
        data = b"".join(parts)
        self._entries.append(
            {
                "number": block.number,
                "start": start,
                "length": len(data),
                "sha256": sha256(data).hexdigest(),
                "arrays": places,
                "quarantined": block.quarantined,
                "after": asdict(after),
            }
        )
        return data

    def _documents(self, documents: tuple[Document, ...]) -> NDArray[np.void]:
        return np.array(
            [
                (d.epoch, d.file, d.line, d.byte, self._domains.setdefault(d.domain, len(self._domains)))
                for d in documents
            ],
            DOCUMENT,
        )


def _place(lane: Path) -> str:
    """Fingerprint and lane that the files of a lane's folder are of."""
    return f"{lane.parent.name}/{lane.name}"


def _delete_if_abandoned(temporary: Path) -> None:
    """Delete a writer's temporary file whose writer has died. A living one that this misses only loses its cache."""
    with suppress(OSError), temporary.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while the writer lives
        temporary.unlink()
