"""`benchmark.py data`: tokens per second of each stage of the data path on one core, beside `datasets` streaming.

All stages process the same text in turn, for several rounds, so that other load on the machine affects all of them. A
ratio compares two figures of one round; the report has the median over rounds.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import new_parser, report
from benchmarks.data_stages import ENCODER, USUAL, WHOLE, Timing, micro_batches, run_config, stages
from benchmarks.texts import Text, books, library_documents, read_documents, short_documents, write_shard, write_text
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import train_tokenizer

ROUNDS = 5
VOCABULARY = 32_000
RATIOS = ((WHOLE, ENCODER), (WHOLE, USUAL))
PACKAGES = ("numpy", "sentencepiece", "datasets", "pyarrow", "orjson", "zstandard")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("data")
    parser.add_argument("--files", metavar="GLOB", help="text to measure; default: the standard library's sources")
    parser.add_argument("--tokenizer", metavar="MODEL", type=Path, help="default: one trained on the standard library")
    parser.add_argument("--tokens", metavar="N", type=int, default=5_000_000, help="of each text (%(default)s)")
    parser.add_argument(
        "--documents", metavar="N", type=int, default=1_000_000, help="tiny ones that memory is seen over (%(default)s)"
    )
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, one_core():
            return measure(
                Path(folder),
                files=options.files,
                model=options.tokenizer,
                tokens=options.tokens,
                documents=options.documents,
            )

    return report(options, ["data", *argv], PACKAGES, measured, markdown)


def measure(folder: Path, *, files: str | None, model: Path | None, tokens: int, documents: int) -> dict[str, Any]:
    """Rates on each text, and memory over many documents. `folder` is for temporary files."""
    if model is None:
        model = folder / "tokenizer.model"
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # its memory is not the data path's
            process.submit(_train_tokenizer, folder / "library", model).result()
    tokenizer = Tokenizer.load(model)
    memory = resident_memory(folder, tokenizer, documents=documents)
    if files is None:
        library = list(library_documents(folder / "library"))
        kinds = {"short documents": short_documents(library), "books": books(library)}
    else:
        kinds = {"files": read_documents(files)}
    measured = {}
    for name, kind in kinds.items():
        text = write_text(folder / name, kind, tokenizer, tokens=tokens)
        measured[name] = rates(text, model, run_config(text.shards), rounds=ROUNDS)
    return {"texts": measured, "memory": memory}


def _train_tokenizer(library: Path, model: Path) -> None:
    train_tokenizer(library_documents(library), model, vocab_size=VOCABULARY)


@contextmanager
def one_core() -> Iterator[None]:
    """Run all threads of this process on one core. Raises UserError if the system does not support that."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this system binds no thread to a core: run the benchmark on Linux")
    allowed = os.sched_getaffinity(0)
    _bind({max(allowed)})
    try:
        yield
    finally:
        _bind(allowed)


def _bind(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def rates(text: Text, model: Path, config: Config, *, rounds: int) -> dict[str, Any]:
    """All stages in turn, `rounds` times after one that does not count: medians, and ratios round by round."""
    needed = config.train.micro_batch_size * (config.data.sequence_length + 1)
    if text.tokens < needed:
        raise UserError(f"the text has {text.tokens:,} tokens, fewer than a micro-batch of {needed:,}: give more of it")
    timed = stages(text, model, config)
    gc.collect()
    gc.freeze()  # the text is held for the measurement alone: searching it for garbage is no part of any stage
    try:
        found = [{name: stage() for name, stage in timed.items()} for _ in range(rounds + 1)][1:]
    finally:
        gc.unfreeze()
    bytes_per_token = text.bytes / text.tokens
    return {
        "documents": sum(map(len, text.documents)),
        "tokens": text.tokens,
        "bytes": text.bytes,
        "stages": {name: _rate([each[name] for each in found], bytes_per_token) for name in timed},
        "ratios": {f"{over} / {under}": _ratio(found, over, under) for over, under in RATIOS},
        "first_micro_batch_seconds": {name: median(each[name].first for each in found) for name in (WHOLE, USUAL)},
    }


def _rate(timings: Sequence[Timing], bytes_per_token: float) -> dict[str, Any]:
    tokens = [timing.tokens / timing.seconds for timing in timings]
    return {
        "tokens_per_second": median(tokens),
        "megabytes_per_second": median(tokens) * bytes_per_token / 1e6,
        "rounds": tokens,
    }


def _ratio(found: Sequence[dict[str, Timing]], over: str, under: str) -> dict[str, Any]:
    rate = [{name: each[name].tokens / each[name].seconds for name in (over, under)} for each in found]
    ratios = [each[over] / each[under] for each in rate]
    return {"median": median(ratios), "rounds": ratios}


def resident_memory(folder: Path, tokenizer: Tokenizer, *, documents: int) -> dict[str, Any]:
    """This process's resident memory after each quarter of an epoch of many documents of a few words."""
    words = [f"{(number * 2654435761) % 2**32:08x} and {number} more words" for number in range(documents)]
    shard = write_shard(folder / "tiny.jsonl.zst", words)
    sample = words[:: max(1, documents // 1000)]
    tokens = mean(len(ids) + 1 for ids in tokenizer.encode_documents(sample, threads=1)) * documents
    del words
    config = run_config([shard])
    found = []
    with closing(micro_batches(config, tokenizer)) as batches:
        quarter = int(tokens / 4 / next(batches).size)
        for _ in range(4):
            for _ in islice(batches, quarter):
                pass
            found.append(_resident())
    return {"documents": documents, "tokens": round(tokens), "megabytes_at_quarters": found}


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report with its environment."""
    texts = report["texts"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows = [
        ["on one core", *(f"{name}, {unit}" for name in texts for unit in ("Mtokens/s", "MB/s"))],
        ["---", *["---:"] * 2 * len(texts)],
    ]
    for stage in next(iter(texts.values()))["stages"]:
        found = [text["stages"][stage] for text in texts.values()]
        cells = [(each["tokens_per_second"] / 1e6, each["megabytes_per_second"]) for each in found]
        rows.append([stage, *(figure for tokens, size in cells for figure in (f"{tokens:.2f}", f"{size:.1f}"))])
    for ratio in next(iter(texts.values()))["ratios"]:
        found = [text["ratios"][ratio] for text in texts.values()]
        spread = [f"{min(each['rounds']):.2f} to {max(each['rounds']):.2f}" for each in found]
        rows.append(
            [ratio, *(cell for each, to in zip(found, spread, strict=True) for cell in (f"{each['median']:.2f}", to))]
        )
    for name in (WHOLE, USUAL):
        first = [text["first_micro_batch_seconds"][name] for text in texts.values()]
        rows.append([f"{name}: first micro-batch", *(cell for seconds in first for cell in (f"{seconds:.2f} s", ""))])
    sizes = "; ".join(
        f"{name}: {text['documents']:,} documents, {text['tokens']:,} tokens, {text['bytes']:,} bytes"
        for name, text in texts.items()
    )
    memory = report["memory"]
    quarters = ", ".join(f"{size:.0f}" for size in memory["megabytes_at_quarters"])
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['cpu']} ({report['cores']} cores), {versions}.",
            f"Texts: {sizes}.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Resident memory after each quarter of {memory['documents']:,} documents: {quarters} MB.",
        ]
    )
