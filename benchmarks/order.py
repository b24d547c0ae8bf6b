"""`benchmark.py order`: how well each batch represents its corpus, compared with random batches of the same rows.

The loader reads one epoch of corpora that are hard to shuffle. Every token id is replaced by the number of the token in
the corpus, so that it is counted exactly which tokens are seen, how often and when.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import new_parser, report
from benchmarks.order_corpora import Case, Labels, cases, pile_documents
from lamda.config.schema import Config
from lamda.data.corpus import Corpus, open_corpus, packing_of
from lamda.data.documents import Document, Encoded, RawText
from lamda.data.lanes import Cursor, Lane
from lamda.data.loader import Loader, batch_digest
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import train_tokenizer
from lamda.data.windows import SourceOrder

BATCH = 32
SMALL_BATCH = 8
"""Batch size for counting sources."""

DRAWINGS = 20
"""Random permutations of the rows; their mean is reported."""

VOCABULARY = 8_000
TOKENIZER_BYTES = 4_000_000
PACKAGES = ("numpy", "sentencepiece", "zstandard")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("order")
    sample = os.environ.get("LAMDA_TEST_DATA")
    parser.add_argument(
        "--data",
        metavar="GLOB",
        default=None if sample is None else f"{sample}/pile-sample/train/*",
        help="files as The Pile's, to sort by domain; default: the sample in LAMDA_TEST_DATA, or made-up text",
    )
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = {
                case.name: measure(Path(folder) / f"{number}", case)
                for number, case in enumerate(cases(None if options.data is None else pile_documents(options.data)))
            }
        text = "made up" if options.data is None else "The Pile's format"
        return {"sorted_text": text, "batch": BATCH, "cases": found}

    return report(options, ["order", *argv], PACKAGES, measured, markdown)


@dataclass(frozen=True)
class Numbered(RawText):
    """Raw text in which each token, end symbols too, has its number in the corpus for an id.

    numbers: of each text that is encoded by itself. Such texts must differ.
    """

    numbers: dict[str, NDArray[np.uint32]] = field(default_factory=dict)

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """See `Form`: the encoder works as it would, so that times are those of a run."""
        super().encode(documents, tokenizer)
        return [[Encoded(self.numbers[document.text])] for document in documents]


@dataclass(frozen=True)
class Numbers:
    """The tokens of a corpus by number. labels: [tokens] the part of the corpus that each is in, of `parts`."""

    form: Numbered
    labels: NDArray[np.int64]
    parts: int

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, labels: Labels) -> Numbers:
        """Number all tokens, lane by lane, which is the order of the files where they can be cut."""
        form, counts, names, total = Numbered(), list[int](), list[str](), 0
        for lane in corpus.lanes:
            for piece in _pieces(lane, tokenizer):
                ids = RawText().encode([piece], tokenizer)[0][0].ids
                assert piece.text not in form.numbers, f"twice in the corpus: {piece.text[:80]!r}"
                form.numbers[piece.text] = np.arange(total, total + len(ids), dtype=np.uint32)
                counts.append(len(ids))
                total += len(ids)
                names.append(lane.source.name if labels == "source" else piece.domain)
        if labels == "sixteenth":
            return cls(form, np.arange(total) * 16 // total, 16)
        parts = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(form, np.repeat([parts[name] for name in names], counts), len(parts))


def measure(folder: Path, case: Case, *, shuffle: int | str | None = None) -> dict[str, Any]:
    """What the loader does with a corpus that is written to `folder`. shuffle: as `data.shuffle`, default its own."""
    card, tokenizer = case.write(folder), _tokenizer(folder, case)
    data: dict[str, Any] = {"corpus": str(card), "sequence_length": case.length}
    if shuffle is not None:
        data["shuffle"] = shuffle
    train = {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH}
    config = Config.model_validate({"data": data, "train": train})
    corpus = open_corpus(config.data)
    numbers = Numbers.of(corpus, tokenizer, case.labels)
    epoch = _read_an_epoch(config, tokenizer, numbers, rows=case.rows)
    rows = len(epoch.targets)
    seen = np.bincount(np.concatenate(epoch.targets), minlength=len(numbers.labels))
    shares = np.stack([np.bincount(numbers.labels[each], minlength=numbers.parts) for each in epoch.targets])
    sources = corpus.mixture.rows(np.arange(rows))[0]
    weights = np.array([lanes[0].source.weight for lanes in corpus.sources])
    share_of_weight = np.bincount(sources, minlength=len(weights)) / (weights / weights.sum() * rows)
    return {
        "tokens": len(numbers.labels),
        "rows": rows,
        "sequence_length": case.length,
        "lanes": len(corpus.lanes),
        "labels": case.labels,
        "never_seen": float((seen == 0).mean()) if case.rows is None else None,
        "seen_most_often": int(seen.max()) if case.rows is None else None,
        "share_of_weight": [float(share_of_weight.min()), float(share_of_weight.max())],
        "distance": _distances(shares[None]),
        "random_distance": _distances(_drawn(shares)),
        "sources": len(weights),
        "sources_per_small_batch": _distinct(sources[None]),
        "random_sources_per_small_batch": _distinct(_drawn(sources)),
        "first_batch_seconds": epoch.first_seconds,
        "resume_seconds": epoch.resume_seconds,
        "windows": epoch.windows,
        "largest_window": {
            "rows": epoch.largest_window,
            "megabytes": epoch.largest_window * (case.length + 1) * 4 / 1e6,
        },
    }


@dataclass
class _Epoch:
    """Rows in the order of samples: the numbers of the targets of each. windows: that were read."""

    targets: list[NDArray[np.uint32]]
    first_seconds: float
    resume_seconds: float
    windows: int
    largest_window: int


def _read_an_epoch(config: Config, tokenizer: Tokenizer, numbers: Numbers, *, rows: int | None) -> _Epoch:
    """As many rows as all sources together have in an epoch, or `rows`; and a resume in the middle of them."""
    windows, ends = list[int](), dict[int, int]()

    def keep(source: int, order: SourceOrder) -> None:
        window = order.windows[-1]
        windows.append(window.rows)
        if window.is_last:
            ends.setdefault(source, window.base + window.rows)

    targets: list[NDArray[np.uint32]] = []
    middle: list[tuple[int, tuple[SourceOrder, ...]]] = []
    digests: list[str] = []
    began = perf_counter()
    corpus = open_corpus(config.data, form=numbers.form)
    with _loader(corpus, config, tokenizer, on_window=keep) as loader:
        for step in loader:
            if not digests:
                first = perf_counter() - began
            (batch,) = step.micro_batches
            by_sample = np.argsort(step.positions)
            targets += [batch.ids[row, 1:][batch.loss_mask[row]] for row in by_sample]
            digests.append(batch_digest(step.digests[by_sample]))
            middle.append((step.consumed, loader.order()))
            wanted = rows if rows is not None else sum(ends.values()) if len(ends) == len(corpus.sources) else None
            if wanted is not None and len(targets) >= wanted and len(digests) > 1:
                break
    half = (len(digests) - 1) // 2
    consumed, order = middle[half]
    began = perf_counter()
    corpus = open_corpus(config.data, form=numbers.form)
    with _loader(corpus, config, tokenizer, consumed=consumed, order=order) as loader:
        step = next(iter(loader))
        resumed = perf_counter() - began
    if batch_digest(step.digests[np.argsort(step.positions)]) != digests[half + 1]:
        raise AssertionError(f"resuming after sample {consumed} gives another step")
    return _Epoch(targets[:wanted], first, resumed, len(windows), max(windows))


def _loader(corpus: Corpus, config: Config, tokenizer: Tokenizer, **options: Any) -> Loader:
    return Loader(
        corpus,
        tokenizer,
        packing=packing_of(config),
        seed=config.run.seed,
        batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        threads=config.data.threads,
        **options,
    )


def _pieces(lane: Lane, tokenizer: Tokenizer) -> Iterator[Document]:
    for entry in lane.read(Cursor()):
        assert isinstance(entry, Document)
        yield from lane.form.pieces(entry, tokenizer)


def _tokenizer(folder: Path, case: Case) -> Tokenizer:
    train_tokenizer(case.texts(TOKENIZER_BYTES), folder / "tokenizer.model", vocab_size=VOCABULARY)
    return Tokenizer.load(folder / "tokenizer.model")


def _drawn(rows: NDArray[Any]) -> NDArray[Any]:
    """The same rows, [n, ...], drawn at random without replacement several times, [DRAWINGS, n, ...]."""
    drawing = np.random.default_rng(0)
    return np.stack([rows[drawing.permutation(len(rows))] for _ in range(DRAWINGS)])


def _distances(shares: NDArray[np.int64]) -> dict[str, float]:
    """Total-variation distance of a batch from all rows, the mean of all batches and of the first tenth of them.

    shares: [drawings, rows, parts], the tokens of each row by the part of the corpus that they are in.
    """
    drawings, rows, parts = shares.shape
    size = min(BATCH, rows)
    batches = shares[:, : rows // size * size].reshape(drawings, -1, size, parts).sum(2)
    corpus = shares.sum(1, keepdims=True)
    found = np.abs(batches / batches.sum(2, keepdims=True) - corpus / corpus.sum(2, keepdims=True)).sum(2) / 2
    return {"mean": float(found.mean()), "first_tenth": float(found[:, : -(-found.shape[1] // 10)].mean())}


def _distinct(sources: NDArray[Any]) -> float:
    """Different sources in a batch of SMALL_BATCH rows, on average. sources: [drawings, rows]."""
    batches = sources[:, : sources.shape[1] // SMALL_BATCH * SMALL_BATCH].reshape(-1, SMALL_BATCH)
    return float(np.mean([len(np.unique(batch)) for batch in batches]))


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    rows = [
        [f"batches of {report['batch']}", "never seen", "most often", "distance", "at random", "first tenth",
         "at random", "sources in 8", "at random", "of its weight", "first batch", "resume", "largest window"],
        ["---", *["---:"] * 12],
    ]  # fmt: skip
    for name, case in report["cases"].items():
        has_sources, window, never = case["sources"] > 1, case["largest_window"], case["never_seen"]
        rows.append(
            [
                f"{name} ({case['tokens']:,} tokens, L {case['sequence_length']}, {case['lanes']} lanes)",
                *(["", ""] if never is None else [f"{never:.2%}", f"{case['seen_most_often']}"]),
                *(f"{case[kind][when]:.3f}" for when in ("mean", "first_tenth") for kind in DISTANCES),
                *(f"{case[kind]:.2f}" if has_sources else "" for kind in DISTINCT),
                " to ".join(f"{share:.2f}" for share in case["share_of_weight"]) if has_sources else "",
                *(f"{case[kind]:.2f} s" for kind in ("first_batch_seconds", "resume_seconds")),
                f"{window['rows']:,} rows, {window['megabytes']:.1f} MB",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['cpu']} ({report['cores']} cores), {versions}.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


DISTANCES = ("distance", "random_distance")
DISTINCT = ("sources_per_small_batch", "random_sources_per_small_batch")
