"""Ready blocks: what a lane has made once is kept, mapped into memory, and never made again.

A folder holds, for each lane, files of consecutive blocks: `lane-0003/00000128-00000192.blocks`. A file is
written under a temporary name and renamed when it is whole, so that every file there is complete; each
block in it has a checksum. Two writers of the same blocks write the same bytes.

    file = block data | index (JSON) | length of the index, 8 bytes | sha256 of the index, 32 bytes | MAGIC
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.data.blocks import RUN, Block, Packing, read_blocks
from lamda.data.documents import Document
from lamda.data.errors import DataError
from lamda.data.lanes import Cursor, Lane
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

MAGIC = b"LAMDABLK"
GROUP = 64
"""A file ends at a multiple of this many blocks."""

DOCUMENT = np.dtype([("epoch", "<i4"), ("file", "<i4"), ("line", "<i8"), ("byte", "<i8"), ("domain", "<i4")])


@dataclass(frozen=True)
class BlockFolder:
    """The blocks of one fingerprint under `data.blocks`."""

    path: Path

    @classmethod
    def of(cls, folder: str, fingerprint: dict[str, Any]) -> BlockFolder:
        """The part of `folder` for everything that blocks depend on: the fingerprint but for the weights."""
        parts = {key: value for key, value in fingerprint.items() if key != "weights"}
        name = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(folder) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.blocks {folder}: cannot be written to ({error.strerror})") from error
        if not (path / "fingerprint.json").exists():
            (path / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1), "utf-8")
        return cls(path)

    def blocks(
        self, lane: Lane, cursor: Cursor, *, packing: Packing, tokenizer: Tokenizer
    ) -> Generator[tuple[Block, Cursor]]:
        """As `read_blocks`; ready blocks are mapped, the others made and kept."""
        while True:
            file = self._file_with(lane.index, cursor.block)
            found = file.read_from(cursor.block) if file else self._make(lane, cursor, packing, tokenizer)
            for block, after in found:
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
            start, stop = map(int, path.stem.split("-"))
            if start <= number < stop:
                return _BlockFile(path, stop)
        return None

    def _make(
        self, lane: Lane, cursor: Cursor, packing: Packing, tokenizer: Tokenizer
    ) -> Iterator[tuple[Block, Cursor]]:
        """Make blocks to the end of a file, or until nobody asks for more; keep them in either case."""
        writer = _Writer(self._lane(lane.index), cursor.block, narrow=tokenizer.vocab_size <= 1 << 16)
        try:
            for block, after in read_blocks(lane, cursor, packing=packing, tokenizer=tokenizer):
                writer.add(block, after)
                yield block, after
                if after.block % GROUP == 0:
                    return
        finally:
            writer.close()


@dataclass(frozen=True)
class _BlockFile:
    path: Path
    stop: int

    def read_from(self, number: int) -> Iterator[tuple[Block, Cursor]]:
        """Blocks from `number` to the end of the file. Raises DataError where the file is damaged."""
        data = np.memmap(self.path, np.uint8, mode="r")
        index = self._index(data)
        for entry in index["blocks"]:
            if entry["number"] >= number:
                yield self._block(data, entry, index["domains"])

    def _index(self, data: NDArray[np.uint8]) -> dict[str, Any]:
        if len(data) < 48 or data[-8:].tobytes() != MAGIC:
            raise self._damaged()
        length = int.from_bytes(data[-48:-40].tobytes(), "little")
        content = data[max(0, len(data) - 48 - length) : -48].tobytes()
        if sha256(content).digest() != data[-40:-8].tobytes():
            raise self._damaged()
        return json.loads(content)

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
    """Writes a file of consecutive blocks; it appears when `close` is called."""

    def __init__(self, folder: Path, start: int, *, narrow: bool) -> None:
        self._folder, self._start, self._narrow = folder, start, narrow
        self._entries: list[dict[str, Any]] = []
        self._domains: dict[str, int] = {}
        self._stream: IO[bytes] | None = None
        self._temporary = folder / f".{start:08}-{os.getpid()}-{os.urandom(4).hex()}.tmp"

    def add(self, block: Block, after: Cursor) -> None:
        """Append a block and the cursor of the next."""
        if self._stream is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._temporary.open("wb")
        arrays = {"ids": block.ids.astype("<u2" if self._narrow else "<u4"), "runs": block.runs}
        arrays["documents"] = self._documents(block.documents)
        if block.loss_mask is not None:
            arrays["loss_mask"] = block.loss_mask
        places, parts, start = {}, [], 0
        for name, array in arrays.items():
            kind = {RUN: "RUN", DOCUMENT: "DOCUMENT"}.get(array.dtype, array.dtype.str)
            places[name] = (kind, array.shape, start)
            parts.append(array.tobytes() + b"\0" * (-array.nbytes % 8))
            start += len(parts[-1])
        data = b"".join(parts)
        self._entries.append(
            {
                "number": block.number,
                "start": self._stream.tell(),
                "length": len(data),
                "sha256": sha256(data).hexdigest(),
                "arrays": places,
                "quarantined": block.quarantined,
                "after": asdict(after),
            }
        )
        self._stream.write(data)

    def close(self) -> None:
        """Bring what was added to the disk, under its final name."""
        if self._stream is None:
            return
        index = json.dumps({"domains": list(self._domains), "blocks": self._entries}).encode()
        with self._stream as stream:
            stream.write(index + len(index).to_bytes(8, "little") + sha256(index).digest() + MAGIC)
            stream.flush()
            os.fsync(stream.fileno())
        stop = self._start + len(self._entries)
        self._temporary.replace(self._folder / f"{self._start:08}-{stop:08}.blocks")
        self._stream = None

    def _documents(self, documents: tuple[Document, ...]) -> NDArray[np.void]:
        return np.array(
            [
                (d.epoch, d.file, d.line, d.byte, self._domains.setdefault(d.domain, len(self._domains)))
                for d in documents
            ],
            DOCUMENT,
        )
