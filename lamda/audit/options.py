"""What `lamda data audit` and `lamda data clean` share: the text or the shards that they are given."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamda.config.errors import UserError, nearest

if TYPE_CHECKING:
    from lamda.audit.records import Shards
    from lamda.audit.scan import Parts
    from lamda.data.corpus import Corpus

PARTS = ("near", "pii", "lines", "language")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what to read."""
    add = parser.add_argument
    add("files", nargs="*", metavar="FILES", help="text, as data.files; or the folders of all shards of an audit")
    add("--corpus", metavar="CARD", help="how records are read (default pile); without FILES, the text")
    add("--against", nargs="+", default=[], metavar="FILES", help="evaluation text, to find what overlaps with it")
    add("--memory", type=float, default=2.0, metavar="GB", help="for finding duplicates and overlap (%(default)s)")
    add("--json", action="store_true", help="one JSON object")


def names(text: str, known: Sequence[str], option: str) -> set[str]:
    """The names of a comma-separated list. Raises UserError for an unknown one."""
    given = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(given - set(known)):
        raise UserError(f"{option}: there is no {name!r}; there are {', '.join(known)}{nearest(name, known)}")
    return given


def memory_of(options: argparse.Namespace) -> int:
    """`--memory` in bytes. Raises UserError."""
    if not 0 < options.memory < 1e6:
        raise UserError(f"--memory {options.memory:g}: is a number of gigabytes")
    return int(options.memory * 1e9)


def open_text(files: Sequence[str], card: str | None) -> Corpus:
    """The corpus of files, or of a card, one lane per source. Raises UserError."""
    if not files and card is None:
        raise UserError("name the text: FILES, or --corpus CARD for that of a card")
    from lamda.config.loading import load_config
    from lamda.data.corpus import open_corpus

    flags = ["--data.corpus", card or "pile", "--data.shuffle", "none", "--train.steps", "1"]
    if files:
        flags += ["--data.files", json.dumps(list(files))]
    return open_corpus(load_config(flags).data)


def shard_folders(options: argparse.Namespace) -> list[Path]:
    """The shards among FILES; empty if they are text. Raises UserError for both."""
    from lamda.audit.records import SUMMARY

    folders = [Path(name) for name in options.files if (Path(name) / SUMMARY).is_file()]
    if folders and len(folders) < len(options.files):
        text = next(name for name in options.files if Path(name) not in folders)
        raise UserError(f"{text}: give text or shards of an audit, not both ({folders[0]} is a shard)")
    if folders and options.against:
        raise UserError("--against: the shards were audited already; give it to `lamda data audit --shard`")
    return folders


def parts_of(options: argparse.Namespace, chosen: Collection[str], tokenizer: str | None = None) -> Parts:
    """What a pass does. chosen: of PARTS. Raises UserError."""
    from lamda.audit.evaluation_overlap import EvaluationNgrams
    from lamda.audit.scan import Parts, require_packages
    from lamda.data.tokenizer import Tokenizer

    if {"near", "language"} & set(chosen):
        require_packages()
    evaluation = None
    if options.against:
        documents = open_text(options.against, options.corpus).documents_once()
        evaluation = EvaluationNgrams((document.text for document in documents), memory=memory_of(options))
    return Parts(
        **{name: name in chosen for name in PARTS},
        evaluation=evaluation,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
    )


def scan_into(target: Path, options: argparse.Namespace, parts: Parts, *, shard: tuple[int, int] = (1, 1)) -> None:
    """Read the text, or a shard of it, into a folder. shard: its number from 1, and how many there are."""
    from lamda.audit.records import Writer
    from lamda.audit.scan import Scan
    from lamda.console import Progress
    from lamda.data.drop_list import file_entries

    corpus = open_text(options.files, options.corpus)
    with Writer(target) as writer:
        memory = memory_of(options) if shard[1] == 1 else None
        scan = Scan(corpus, writer, parts, shard=shard[0] - 1, shards=shard[1], memory=memory)
        with Progress("reading text", total=scan.total, unit="bytes") as show:
            scan.run(show.advance)
        evaluation = parts.evaluation
        writer.finish(
            {
                "shard": shard,
                "documents": scan.documents,
                "files": file_entries(corpus.files),
                "options": _facts(options, parts),
                "evaluation": None if evaluation is None else [evaluation.documents, evaluation.too_short],
                **scan.summary.to_json(),
            }
        )


def _facts(options: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """What shards of one audit have in common."""
    return {
        "corpus": options.corpus,
        "against": list(options.against),
        "parts": [name for name in PARTS if getattr(parts, name)],
        "tokenizer": None if parts.tokenizer is None else parts.tokenizer.sha256,
    }


@contextmanager
def collected(options: argparse.Namespace, chosen: Collection[str], tokenizer: str | None = None) -> Iterator[Shards]:
    """The records of the shards or of the text that the options name. Raises UserError."""
    from lamda.audit.records import Shards

    memory, folders = memory_of(options), shard_folders(options)
    if folders:
        yield Shards.read(folders, memory=memory)
        return
    with tempfile.TemporaryDirectory(prefix="lamda-audit-") as folder:
        target = Path(folder) / "shard"
        scan_into(target, options, parts_of(options, chosen, tokenizer))
        yield Shards.read([target], memory=memory)
