"""`lamda data audit`: what a corpus holds, as a table, JSON or an HTML page."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamda.audit.options import (
    PARTS,
    add_text_options,
    collected,
    names,
    parts_of,
    scan_into,
    shard_folders,
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
    from lamda.audit.records import require_folder
    from lamda.audit.report import report_of

    if options.html:
        require_folder(options.html)
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
    from lamda.audit.report import found, lengths, place
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
