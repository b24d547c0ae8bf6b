"""Row cache: rows of lanes and windows on disk, memory-mapped, so that text is encoded only once.

There is one file per lane and window, such as `lane-0003/00000128.rows`. It has checksums, and is written under a
temporary name and renamed when complete. Concurrent writers of the same rows write the same bytes. A writer locks its
temporary file (`flock`), so that later writers can delete the files of killed ones.

    file = arrays | index (JSON) | length of the index, 8 bytes | sha256 of the index, 32 bytes | MAGIC
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamda.best_effort import reason_of
from lamda.config.errors import DataError, UserError
from lamda.data.blocks import SPAN, Part, PartRows, RowBlock
from lamda.data.documents import Document
from lamda.data.lanes import Cursor
from lamda.data.quarantine import BadLine
from lamda.durable import replace_file

MAGIC = b"LAMDAROW"

DOCUMENT = np.dtype([("file", "<i4"), ("line", "<i8"), ("byte", "<i8"), ("domain", "<i4")])


@dataclass(frozen=True)
class RowCache:
    """The cached rows of one fingerprint. guard: context around every access to the folder, which handles OSError."""

    path: Path
    guard: AbstractContextManager[object]

    @classmethod
    def of(
        cls, folder: str, fingerprint: dict[str, Any], *, guard: AbstractContextManager[object] | None = None
    ) -> RowCache:
        """The cache for a fingerprint without its weights. guard: handles OSError; the default raises UserError."""
        parts = {key: value for key, value in fingerprint.items() if key != "weights"}
        name = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        path, guard = Path(folder) / name, guard or _Required(folder)
        with guard:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "fingerprint.json").exists():
                replace_file(path / "fingerprint.json", json.dumps(fingerprint, indent=1))
        return cls(path, guard)

    def find(self, lane: int, window: int, part: Part) -> PartRows | None:
        """The memory-mapped rows of a lane in a window, if cached. Raises DataError if their file is damaged."""
        with self.guard:
            path = self._path(lane, window)
            if path.exists():
                return _read(path, part)
        return None

    def store(self, lane: int, window: int, part: Part, rows: PartRows, *, narrow: bool) -> None:
        """Write the rows of a lane in a window. narrow: ids fit into 16 bits."""
        with self.guard:
            path = self._path(lane, window)
            _write(path, _content(path, part, rows, narrow=narrow))

    def _path(self, lane: int, window: int) -> Path:
        return self.path / f"lane-{lane:04}" / f"{window:08}.rows"


@dataclass(frozen=True)
class _Required:
    """Raises UserError if the folder cannot be used."""

    folder: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"data.cache_dir {self.folder}: cannot be read or written ({reason_of(error)}); complete files "
                "are kept, and the same command continues"
            ) from error


def _read(path: Path, part: Part) -> PartRows | None:
    """The rows of a file; None if they are of another part. Raises DataError if it is damaged, and OSError."""
    if path.stat().st_size == 0:  # left by a crash of the machine; cannot be memory-mapped
        raise _damaged(path)
    data = np.memmap(path, np.uint8, mode="r")
    index = _index(data, path)
    if index["place"] != _place(path):
        raise DataError(
            f"{path}: has the rows of {index['place']}, not those of its name; was it moved? Delete it, and its rows "
            "are computed again"
        )
    ends = index["epoch"], index["target"]  # windows have other ends under other weights
    if Cursor(**index["start"]).place != part.start.place or ends != (part.epoch, part.target):
        return None
    if part.rows not in (None, index["arrays"]["ids"][1][0]):
        return None
    length = index["length"]
    if sha256(data[:length].data).hexdigest() != index["sha256"]:
        raise _damaged(path)
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape, start) in index["arrays"].items():
        kind = {"SPAN": SPAN, "DOCUMENT": DOCUMENT}.get(dtype) or np.dtype(dtype)
        arrays[name] = np.frombuffer(data, kind, int(np.prod(shape)), start).reshape(shape)
    domains = index["domains"]
    documents = tuple(
        Document("", domains[row["domain"]], int(row["file"]), int(row["line"]), int(row["byte"]), epoch=part.epoch)
        for row in arrays["documents"]
    )
    bad = tuple(BadLine(*each) for each in index["quarantined"])
    block = RowBlock(arrays["ids"], arrays["spans"], documents, bad, arrays.get("loss_mask"))
    return PartRows(block, index["tokens"], Cursor(**index["after"]))


def _index(data: NDArray[np.uint8], path: Path) -> dict[str, Any]:
    if len(data) < 48 or data[-8:].tobytes() != MAGIC:
        raise _damaged(path)
    length = int.from_bytes(data[-48:-40].tobytes(), "little")
    content = data[max(0, len(data) - 48 - length) : -48].tobytes()
    if sha256(content).digest() != data[-40:-8].tobytes():
        raise _damaged(path)
    return json.loads(content)


def _place(path: Path) -> str:
    """Fingerprint, lane and window of a file."""
    return "/".join(path.with_suffix("").parts[-3:])


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: damaged; delete it, and its rows are computed again")


def _content(path: Path, part: Part, rows: PartRows, *, narrow: bool) -> bytes:
    """The bytes of a file."""
    block, domains = rows.block, dict[str, int]()
    documents = np.array(
        [(d.file, d.line, d.byte, domains.setdefault(d.domain, len(domains))) for d in block.documents], DOCUMENT
    )
    arrays = {"ids": block.ids.astype("<u2" if narrow else "<u4"), "spans": block.spans, "documents": documents}
    if block.loss_mask is not None:
        arrays["loss_mask"] = block.loss_mask
    kept, parts, size = {}, [], 0
    for name, array in arrays.items():
        kind = {SPAN: "SPAN", DOCUMENT: "DOCUMENT"}.get(array.dtype, array.dtype.str)
        kept[name] = (kind, array.shape, size)
        parts.append(array.tobytes() + b"\0" * (-array.nbytes % 8))
        size += len(parts[-1])
    data = b"".join(parts)
    index = {
        "place": _place(path),
        "epoch": part.epoch,
        "start": part.start._asdict(),
        "target": part.target,
        "after": rows.after._asdict(),
        "tokens": rows.tokens,
        "length": size,
        "sha256": sha256(data).hexdigest(),
        "arrays": kept,
        "domains": list(domains),
        "quarantined": block.quarantined,
    }
    end = json.dumps(index).encode()
    return data + end + len(end).to_bytes(8, "little") + sha256(end).digest() + MAGIC


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, locked meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".*.tmp"):
        _delete_if_abandoned(leftover)
    temporary = path.parent / f".{path.stem}-{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        with temporary.open("wb") as stream:
            with suppress(OSError):  # a file system without locks, on which no file counts as abandoned
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _delete_if_abandoned(temporary: Path) -> None:
    """Delete the temporary file of a dead writer. A live writer, in a race, would only lose this file."""
    with suppress(OSError), temporary.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while the writer lives
        temporary.unlink()
