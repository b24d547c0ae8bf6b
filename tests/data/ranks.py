"""Ranks in one process, a thread each, and text of numbers: each token of a corpus differs from every other one."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from numpy.typing import NDArray

from lamda.config.schema import Config
from lamda.data.corpus import Corpus, packing_of
from lamda.data.loader import Loader, StepBatch, batch_digest
from lamda.data.order import next_samples
from lamda.data.quarantine import Quarantined, first_of
from lamda.data.row_cache import RowCache
from lamda.data.windows import SourceOrder, Window


class Numbers:
    """A text is numbers between spaces, and these are its ids."""

    end_of_document, padding, vocab_size, sha256 = 0, 1, 1 << 16, "numbers"
    token_bytes = np.ones(1 << 16, np.int64)

    def encode_documents(self, texts: Sequence[str], *, threads: int) -> list[NDArray[np.uint32]]:
        return [np.array(text.split(), np.uint32) for text in texts]

    def pieces(self, text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[start : start + 40]) + " " for start in range(0, len(words), 40)] or [text]


BAD, BLANK = "bad", "blank"
Line = list[int] | str
"""A document's ids, or BAD or BLANK."""


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
SUFFIXES = (
    ".jsonl", ".jsonl.zst", ".ndjson.gz", ".json", ".json.xz", ".jsonl.bz2", ".array.json", ".array.json.gz", ".csv",
    ".tsv.gz", ".parquet", ".arrow", ".stream.arrow", ".zip", ".tar", ".tar.gz", ".txt", ".md.gz", ".html",
)  # fmt: skip
"""One or more of each kind of file that is read."""
SINGLE = (".txt", ".md.gz", ".html")
"""Those that hold one document."""


def write_file(path: Path, lines: Sequence[Line]) -> None:
    """A file of lines by its name; a SINGLE one holds the one line that it is given, a file of rows no blank ones."""
    name, pack = path.name, PACK.get(path.suffix, bytes)
    texts = [None if line == BAD else " ".join(map(str, line)) for line in lines if line != BLANK]
    rows = iter(texts)
    if name.endswith(SINGLE):
        path.write_bytes(pack(texts[0].encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=3)
    elif path.suffix == ".arrow":
        table = pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())})
        new = pa.ipc.new_stream if ".stream" in name else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif ".array.json" in name:
        content = json.dumps([{"text": text} for text in texts], indent=len(texts) % 3 or None)
        path.write_bytes(pack(content.encode()))
    elif ".csv" in name or ".tsv" in name:
        with io.StringIO(newline="") as file:
            writer = csv.writer(file, delimiter="," if ".csv" in name else "\t")
            writer.writerow(["note", "text"])
            for line in lines:
                text = None if line == BLANK else next(rows)
                writer.writerow([] if line == BLANK else ["a"] if text is None else ['two "lines",\nhere', text])
            path.write_bytes(pack(file.getvalue().encode()))
    elif path.suffix == ".zip" or ".tar" in name:
        members = [
            (f"{n}.png", b"x") if line == BLANK else (f"{n}.jsonl", b"{no json") if line == BAD
            else (f"{n}.txt", " ".join(map(str, line)).encode())
            for n, line in enumerate(lines)
        ]  # fmt: skip
        write_archive(path, members)
    else:
        kinds = {BAD: "{no json", BLANK: " "}
        content = [
            json.dumps({"text": " ".join(map(str, line))}) if not isinstance(line, str) else kinds[line]
            for line in lines
        ]
        path.write_bytes(pack("".join(line + "\n" for line in content).encode()))


def write_archive(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """A .zip, .tar or .tar.gz with these files."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def config_of(folder: Path, weights: Sequence[float], *, batch: int = 12, **data: Any) -> Config:
    """A run over the sources `0`, `1`, ... in folders of these names."""
    sources = [
        {"name": str(number), "license": "none", "files": f"{folder}/{number}/*", "weight": weight}
        for number, weight in enumerate(weights)
    ]
    (folder / "card.yaml").write_text(yaml.safe_dump({"name": "c", "description": "numbers", "sources": sources}))
    return Config.model_validate(
        {
            "run": {"seed": 5},
            "data": {"corpus": str(folder / "card.yaml"), "cache_dir": str(folder / "blocks"), **data},
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": 1},
        }
    )


ROWS = ("ids", "loss_mask", "domains")


@dataclass
class Run:
    """What ranks read. ids, scored, domains: [B, L+1], [B, L], [B, L] of each step, in the order of its samples."""

    digests: list[str] = field(default_factory=list)
    ids: list[NDArray[np.uint32]] = field(default_factory=list)
    loss_mask: list[NDArray[np.bool_]] = field(default_factory=list)
    domains: list[NDArray[np.int16]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    order: tuple[SourceOrder, ...] = ()
    consumed: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)
    windows: list[tuple[int, Window]] = field(default_factory=list)


class _Exchange:
    def __init__(self, world_size: int) -> None:
        self.barrier, self._values = Barrier(world_size, timeout=60), [None] * world_size

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def exchange(value: Any) -> list[Any]:
            self._values[rank] = value
            self.barrier.wait()
            values = list(self._values)
            self.barrier.wait()
            return values

        return exchange


def read(
    config: Config,
    corpus: Corpus,
    tokenizer: Any,
    *,
    count: int | None = None,
    until: Callable[[StepBatch], bool] | None = None,
    world_size: int = 1,
    after: Run | None = None,
    skipped: Sequence[tuple[int, int]] = (),
    threads: int = 1,
    row_cache: RowCache | None = None,
    with_order: bool = True,
    domains: Sequence[str] = (),
) -> Run:
    """The next `count` steps on `world` ranks, or those until one; after a run, as its checkpoint says."""
    batch = config.train.global_batch_size
    consumed, order = (after.consumed, after.order) if after else (0, ())
    exchange, errors, windows = _Exchange(world_size), [], []
    loaders = [
        Loader(
            corpus, tokenizer, packing=packing_of(config), seed=config.run.seed, batch=batch,
            micro_batch=config.train.micro_batch_size, rank=rank, world_size=world_size, consumed=consumed,
            skipped=skipped,
            order=[saved(each) for each in order] if with_order else (), exchange=exchange.of(rank), threads=threads,
            domains=domains, document_mask=config.data.separates_documents, row_cache=row_cache,
            on_window=lambda source, known, rank=rank: rank or windows.append((source, known.windows[-1])),
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found: list[list[StepBatch]] = [[] for _ in loaders]

    def run(rank: int) -> None:
        try:
            for step in loaders[rank] if count != 0 else ():
                found[rank].append(step)
                if len(found[rank]) == count or (until is not None and until(step)):
                    break
        except BaseException as error:  # a rank that fails must not leave the others waiting
            errors.append(error)
            exchange.barrier.abort()

    ranks = [Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    for loader in loaders:
        loader.close()
    if errors:
        raise errors[0]
    assert all(loader.order() == loaders[0].order() for loader in loaders)
    result = Run(order=loaders[0].order(), consumed=consumed, windows=windows)
    result.quarantined = first_of(each for loader in loaders for each in loader.quarantined())
    for parts in zip(*found, strict=True):
        _add(result, parts, batch=batch, skipped=skipped)
    return result


def _add(run: Run, parts: Sequence[StepBatch], *, batch: int, skipped: Sequence[tuple[int, int]]) -> None:
    """A step of all ranks: each of its samples is one rank's."""
    places = np.concatenate([part.positions for part in parts])
    assert sorted(places) == list(range(batch))
    digests, *rows = (
        np.concatenate(each)[np.argsort(places)]
        for each in (
            [part.digests for part in parts],
            *([getattr(each, name) for part in parts for each in part.micro_batches] for name in ROWS),
        )
    )
    run.consumed = next_samples(run.consumed, batch, skipped)[1]
    assert {part.consumed for part in parts} == {run.consumed}
    assert all(part.epochs == parts[0].epochs for part in parts)
    run.digests.append(batch_digest(digests))
    for name, found in zip(ROWS, rows, strict=True):
        getattr(run, name).append(found)
    run.epochs.append(dict(parts[0].epochs))


def saved(order: SourceOrder) -> SourceOrder:
    """As a checkpoint brings it back."""
    return SourceOrder.from_json(json.loads(json.dumps(asdict(order))))
