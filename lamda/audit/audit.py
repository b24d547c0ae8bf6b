"""`lamda data audit`: what a corpus holds, as a table, JSON or an HTML page."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamda.audit.options import (
    PARTS, add_text_options, collected, names, parts_of, scan_into, shard_folders,
)  # fmt: skip
from lamda.config.errors import UserError

ROWS_SHOWN = 20


def parser() -> argparse.ArgumentParser:
    """The options of `lamda data audit`."""
    parser = argparse.ArgumentParser(prog="lamda data audit", allow_abbrev=False)
    add_text_options(parser)
    add = parser.add_argument
    add("--tokenizer", metavar="MODEL", help="also count tokens, with this SentencePiece model")
    add("--without", default="", metavar="PARTS", help=f"leave out, for speed, of {', '.join(PARTS)}: e.g. near,pii")
    add("--html", type=Path, metavar="PAGE", help="also write a self-contained .html page, with examples")
    add("--shard", metavar="I/N", help="read only the I-th of N parts of the files, from 1; needs --to")
    add("--to", type=Path, metavar="FOLDER", help="where the shard is written")
    return parser


def main(argv: list[str]) -> int:
    """See `parser`; raises UserError."""
    options = parser().parse_args(argv)
    chosen = set(PARTS) - names(options.without, PARTS, "--without")
    if options.shard or options.to:
        return _write_shard(options, chosen)
    if options.html and options.html.suffix not in (".html", ".htm"):
        raise UserError(f"--html {options.html}: a page is a .html file")
    from lamda.audit.findings import find
    from lamda.audit.report import report_of

    with collected(options, chosen, options.tokenizer) as shards:
        report = report_of(shards, find(shards, {"exact", "near"}))
    if options.html:
        from lamda.audit.page import write_page

        write_page(options.html, report)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
        if options.html:
            print(f"{options.html}: opens in any browser")
    return 0


def _write_shard(options: argparse.Namespace, chosen: set[str]) -> int:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.shard or "")
    if not found or not options.to or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError("--shard I/N --to FOLDER: both are needed, with a number I from 1 to N")
    if shard_folders(options):
        raise UserError("--shard: FILES are shards already; give the text")
    shard = int(found[1]), int(found[2])
    scan_into(options.to, options, parts_of(options, chosen, options.tokenizer), shard=shard)
    print(f"{options.to}: shard {options.shard}; give the folders of all {shard[1]} to `lamda data audit` or `clean`")
    return 0


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from lamda.console import one_line, show_table, size_of

    tokens = "" if report["tokens"] is None else f", {report['tokens']:,} tokens"
    print(f"{report['documents']:,} documents, {size_of(report['bytes'])}{tokens}, in {report['files']:,} files")
    for table, title in (("sources", "source"), ("languages", "language (of the first 200 characters)")):
        rows = report["tables"].get(table, {})
        if rows:
            print()
            header = [title, "documents", "bytes", "share", *(["tokens"] if tokens else [])]
            show_table(header, list(_shares(rows, report["bytes"], has_tokens=bool(tokens))))
    print()
    show_table(["bytes", "documents", "share"], list(lengths(report)))
    print()
    show_table(["found", "documents", "share", ""], list(found(report)), left=(0, 3))
    for kind in ("longest", "emptiest"):
        print(f"\n{kind}:")
        for example in report["examples"].get(kind, ())[:3]:
            print(f"  {one_line(place(example))}: {example['about']}")


def _shares(rows: dict[str, list[int]], size: int, *, has_tokens: bool) -> Iterator[list[str]]:
    listed = list(rows.items())
    if len(listed) > ROWS_SHOWN:
        rest = [sum(column) for column in zip(*(row for _, row in listed[ROWS_SHOWN - 1 :]), strict=True)]
        listed = [*listed[: ROWS_SHOWN - 1], (f"{len(listed) - ROWS_SHOWN + 1:,} others", rest)]
    for name, (documents, bytes_, tokens) in listed:
        cells = [name, f"{documents:,}", f"{bytes_:,}", f"{bytes_ / max(1, size):.1%}"]
        yield [*cells, f"{tokens:,}"] if has_tokens else cells


def lengths(report: dict[str, Any]) -> Iterator[list[str]]:
    """Documents by length, in powers of two."""
    for name, (documents, *_) in report["tables"].get("lengths", {}).items():
        power = int(name)
        label = f"{1 << power - 1:,} to {(1 << power) - 1:,}" if power else "0"
        yield [label, f"{documents:,}", f"{documents / max(1, report['documents']):.1%}"]


def found(report: dict[str, Any]) -> Iterator[list[str]]:
    """What was found: name, documents, their share of all, and more about it."""
    for name, documents, about in _found(report):
        yield [name, f"{documents:,}", f"{documents / max(1, report['documents']):.2%}", about]


def _found(report: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    tables, parts = report["tables"], report["options"]["parts"]
    for kind in ("exact", "near"):
        if report[kind] is not None:
            yield f"{kind} duplicates", report[kind]["documents"], f"{report[kind]['bytes']:,} bytes beside the first"
    if report["not_compared"]:
        yield "not compared", report["not_compared"], "candidates in bands that too many documents share"
    if report["overlap"] is not None:
        overlap = report["overlap"]
        yield (
            "evaluation overlap",
            overlap["documents"],
            f"13-grams of {overlap['evaluation_documents_found']:,} of {overlap['evaluation_documents']:,} evaluation "
            f"documents ({overlap['evaluation_documents_too_short']:,} are shorter)",
        )
    yield "without a letter or digit", report["empty"], ""
    if "lines" in parts:
        rows = {int(tenth): row for tenth, row in tables.get("repeated lines", {}).items()}
        yield (
            "30% or more repeated lines",
            sum(row[0] for tenth, row in rows.items() if tenth >= 3),
            f"{sum(row[1] for row in rows.values()):,} lines in all documents are repeated within one",
        )
    if "pii" in parts:
        from lamda.audit.pii import KINDS

        for kind in KINDS:
            documents, strings = tables.get("pii", {}).get(kind, (0, 0))
            yield f"{kind}", documents, f"{strings:,} strings"
    for kind, (documents,) in tables.get("encoding", {}).items():
        yield f"encoding: {kind}", documents, ""
    for reason, (lines,) in tables.get("bad lines", {}).items():
        yield "no document", lines, f"lines: {reason}"


def place(example: dict[str, Any]) -> str:
    """File and line."""
    return f"{example['file']}, line {example['line']:,}"
