"""The stages of the data path, the whole path, and the usual way with `datasets`, each as a timed function."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from math import nan
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import orjson
from datasets import IterableDataset, load_dataset
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from benchmarks.texts import Text
from lamda.config.schema import Config
from lamda.data.blocks import LaneReader, Part
from lamda.data.corpus import Corpus, open_corpus, packing_of
from lamda.data.documents import Document
from lamda.data.files import File, read_all, read_lines
from lamda.data.lanes import RAW_TEXT, Cursor
from lamda.data.loader import Loader, StepBatch
from lamda.data.quarantine import BadLine
from lamda.data.spans import ENCODE_CHARACTERS
from lamda.data.tokenizer import _SPACE_PIECE_UTF8, Tokenizer, _cut

ENCODER, WHOLE, USUAL = "encode", "whole path", "usual way"


class Timing(NamedTuple):
    """Seconds for a number of tokens; first: seconds to the first micro-batch, NaN where it is not measured."""

    seconds: float
    tokens: int
    first: float = nan


def run_config(shards: Sequence[Path], **data: Any) -> Config:
    """A run over shards, on one loader thread."""
    return Config.model_validate(
        {
            "data": {"files": [str(shard) for shard in shards], "threads": 1, **data},
            "train": {"steps": 1, "global_batch_size": 64, "micro_batch_size": 8},
        }
    )


def micro_batches(config: Config, tokenizer: Tokenizer) -> Generator[NDArray[np.uint32], None, None]:
    """Our way, endless: from files to the ids [b, L+1] of a rank's micro-batches."""
    with closing(loader_steps(config, open_corpus(config.data), tokenizer, seed=config.run.seed)) as steps:
        for step in steps:
            yield from (micro_batch.ids for micro_batch in step.micro_batches)


def loader_steps(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, *, seed: int
) -> Generator[StepBatch, None, None]:
    """The steps of a run on one rank, endless. Close it to end the loader's threads."""
    with Loader(
        corpus,
        tokenizer,
        packing=packing_of(config),
        seed=seed,
        batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=0,
        world_size=1,
        threads=config.data.threads,
    ) as loader:
        yield from loader


def usual_dataset(config: Config) -> IterableDataset:
    """The same files as `datasets` streams them."""
    return load_dataset("json", data_files=list(config.data.files or ()), split="train", streaming=True)


def usual_micro_batches(
    dataset: IterableDataset, processor: SentencePieceProcessor, config: Config, *, end: int
) -> Iterator[NDArray[np.int32]]:
    """The usual way, one epoch: documents encoded in batches, with the id `end` after each, then grouped into rows.

    The remainder after the last full micro-batch is dropped.
    """
    length = config.data.sequence_length + 1
    ends = np.array([end], np.int32)
    rest = np.empty(0, np.int32)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[NDArray[np.int32]]]:
        return {"ids": processor.encode(batch["text"], return_type="numpy", num_threads=1)}

    def group(batch: dict[str, list[NDArray[np.int32]]]) -> dict[str, list[NDArray[np.int32]]]:
        nonlocal rest
        stream = np.concatenate([rest, *(part for ids in batch["ids"] for part in (ids, ends))])
        full = len(stream) // length * length
        rest = stream[full:]
        return {"row": list(stream[:full].reshape(-1, length))}

    tokenized = dataset.select_columns(["text"]).map(tokenize, batched=True, remove_columns=["text"])
    grouped = tokenized.map(group, batched=True, remove_columns=["ids"])
    for batch in grouped.iter(config.train.micro_batch_size, drop_last_batch=True):
        yield np.stack(batch["row"])


class _Counting(Tokenizer):
    """Counts its tokens, and one end symbol per text."""

    tokens = 0

    def encode_documents(self, texts: Sequence[str], *, threads: int) -> list[NDArray[np.uint32]]:
        encoded = super().encode_documents(texts, threads=threads)
        self.tokens += sum(len(ids) + 1 for ids in encoded)
        return encoded


def time_whole_path(config: Config, model: Path, *, tokens: int) -> Timing:
    """Seconds from opening the first file to the end of the last thread, for about `tokens` tokens.

    All encoded tokens count, since lanes are read ahead of the last micro-batch.
    """
    tokenizer = _Counting.load(model)
    began = perf_counter()
    with closing(micro_batches(config, tokenizer)) as batches:
        size = next(batches).size
        first = perf_counter() - began
        _consume(islice(batches, tokens // size))
    return Timing(perf_counter() - began, tokenizer.tokens, first)


def time_usual_way(config: Config, processor: SentencePieceProcessor, *, end: int) -> Timing:
    """Seconds of all micro-batches after opening the dataset; `first` includes opening it."""
    began = perf_counter()
    dataset = usual_dataset(config)
    opened = perf_counter()
    batches = usual_micro_batches(dataset, processor, config, end=end)
    found = next(batches).size
    first = perf_counter() - began
    found += _consume(batches)
    return Timing(perf_counter() - opened, found, first)


def _consume(batches: Iterable[NDArray[Any]]) -> int:
    return sum(batch.size for batch in batches)


def stages(text: Text, model: Path, config: Config) -> dict[str, Callable[[], Timing]]:
    """The timed functions by name. A single stage reads the output of the previous stage from memory."""
    tokenizer, processor = Tokenizer.load(model), SentencePieceProcessor(model_file=str(model))
    compressed = [_file(shard) for shard in text.shards]
    plain = [_unpacked(file) for file in compressed]
    lines = [line.data for file in plain for line in read_lines(file)]
    batches = list(_encoder_batches(chain.from_iterable(text.documents)))
    replay: Any = _Replay(text, tokenizer)  # stands for a lane and for a tokenizer
    parts: dict[str, Callable[[], Iterable[object]]] = {
        "decompress": lambda: map(read_all, compressed),
        "split lines": lambda: chain.from_iterable(map(read_lines, plain)),
        "parse JSON": lambda: map(orjson.loads, lines),
        ENCODER: lambda: (processor.encode(batch, return_type="numpy", num_threads=1) for batch in batches),
        "pack": lambda: [LaneReader(replay, replay, packing_of(config)).read(Part(0, Cursor(), None))],
    }
    return {
        **{name: partial(_time_part, part, text.tokens) for name, part in parts.items()},
        WHOLE: partial(time_whole_path, config, model, tokens=text.tokens),
        USUAL: partial(time_usual_way, config, processor, end=tokenizer.end_of_document),
    }


def _time_part(part: Callable[[], Iterable[object]], tokens: int) -> Timing:
    began = perf_counter()
    deque(part(), maxlen=0)
    return Timing(perf_counter() - began, tokens)


def _file(path: Path) -> File:
    return File(str(path), path.stat().st_size)


def _unpacked(file: File) -> File:
    path = Path(file.url).with_suffix("")
    path.write_bytes(read_all(file))
    return _file(path)


def _encoder_batches(documents: Iterable[str]) -> Iterator[list[bytes]]:
    """The pieces that the tokenizer passes to its encoder, in batches of the usual size."""
    batch: list[bytes] = []
    held = 0
    for document in documents:
        batch += [piece for segment in document.encode().split(_SPACE_PIECE_UTF8) for piece in _cut(segment)]
        held += len(document)
        if held >= ENCODE_CHARACTERS:
            yield batch
            batch, held = [], 0
    yield batch


class _Replay:
    """A lane and a tokenizer that return results from memory, so that only packing is timed."""

    form = RAW_TEXT

    def __init__(self, text: Text, tokenizer: Tokenizer) -> None:
        self.end_of_document, self.padding = tokenizer.end_of_document, tokenizer.padding
        self._ids = list(chain.from_iterable(text.ids))
        (lane,) = open_corpus(run_config(text.shards, shuffle="none").data).lanes
        self._documents = list(lane.read(Cursor()))

    def read(self, start: Cursor) -> Iterator[Document | BadLine]:
        """All documents, once."""
        self._coming = iter(self._ids)
        return iter(self._documents)

    def pieces(self, text: str) -> list[str]:
        """The whole text: its ids are known."""
        return [text]

    def encode_documents(self, texts: Sequence[str], *, threads: int) -> list[NDArray[np.uint32]]:
        """The ids of the next documents."""
        return list(islice(self._coming, len(texts)))
