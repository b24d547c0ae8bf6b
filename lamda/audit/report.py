"""The report of an audit as plain values, for the table, for JSON and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lamda.audit import pii
from lamda.audit.findings import Findings
from lamda.audit.records import BEGINNING, Shards
from lamda.audit.summary import Summary

GROUPS_SHOWN = 10
MEMBERS_SHOWN = 4


def report_of(shards: Shards, findings: Findings) -> dict[str, Any]:
    """The figures, tables and examples of a whole corpus.

    Tables have rows by name: in `sources`, `languages` and `lengths` (bytes below 2 to that power) documents, bytes and
    tokens; in `repeated lines` (tenths of a document) documents, lines and characters; in `pii` documents and strings.
    """
    summary = Summary()
    for each in shards.summaries:
        summary.add(Summary.from_json(each))
    first = shards.summaries[0]
    documents, size, tokens, characters, empty = summary.tables.get("total", {}).get("all", [0] * 5)
    counts = findings.counts()
    names = [file[0] for file in first["files"]]
    return {
        "files": len(names),
        "documents": documents,
        "bytes": size,
        "characters": characters,
        "tokens": tokens if first["options"]["tokenizer"] else None,
        "empty": empty,
        "exact": _duplicates(counts["exact"]),
        "near": _duplicates(counts["near"]) if "near" in first["options"]["parts"] else None,
        "not_compared": findings.not_compared,
        "overlap": _overlap(summary, first),
        "tables": {
            name: _sorted(name, rows) for name, rows in summary.tables.items() if name not in ("total", "overlap")
        },
        "examples": {kind: list(_examples(kept, names)) for kind, kept in sorted(summary.examples.items())},
        "groups": {kind: list(_groups(findings, kind, names)) for kind in ("exact", "near")},
        "options": first["options"],
    }


def _duplicates(counts: tuple[int, int]) -> dict[str, int]:
    return {"documents": counts[0], "bytes": counts[1]}


def _overlap(summary: Summary, first: dict[str, Any]) -> dict[str, int] | None:
    if first["evaluation"] is None:
        return None
    documents, ngrams = summary.tables.get("overlap", {}).get("all", [0, 0])
    every, too_short = first["evaluation"]
    return {
        "documents": documents,
        "ngrams": ngrams,
        "evaluation_documents": every,
        "evaluation_documents_found": len(summary.overlapping),
        "evaluation_documents_too_short": too_short,
    }


def _sorted(table: str, rows: dict[str, list[int]]) -> dict[str, list[int]]:
    """Rows by number where names are numbers, with those between that are empty; otherwise the largest first."""
    if table in ("lengths", "repeated lines"):
        numbers, empty = list(map(int, rows)), [0] * len(next(iter(rows.values())))
        return {str(number): rows.get(str(number), empty) for number in range(min(numbers), max(numbers) + 1)}
    return dict(sorted(rows.items(), key=lambda row: ([-amount for amount in row[1]], row[0])))


def _examples(kept: list[tuple[tuple[int, ...], str]], names: list[str]) -> Iterator[dict[str, Any]]:
    for (_, file, byte, line), text in kept:
        about, _, beginning = text.partition("\n")
        yield {"file": names[file], "line": line + 1, "byte": byte, "about": about, "beginning": beginning}


def _groups(findings: Findings, kind: str, names: list[str]) -> Iterator[dict[str, Any]]:
    shards = findings.shards
    for group in findings.groups(kind)[:GROUPS_SHOWN]:
        members = [
            {
                "file": names[document["file"]],
                "line": int(document["line"]) + 1,
                "byte": int(document["byte"]),
                "beginning": pii.hidden(shards.beginning(number), is_whole=document["size"] < BEGINNING.itemsize),
            }
            for number in group[:MEMBERS_SHOWN].tolist()
            for document in [shards.documents[number]]
        ]
        yield {"documents": len(group), "members": members}


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
        for kind in pii.KINDS:
            documents, strings = tables.get("pii", {}).get(kind, (0, 0))
            yield kind, documents, f"{strings:,} strings"
    for kind, (documents,) in tables.get("encoding", {}).items():
        yield f"encoding: {kind}", documents, ""
    for reason, (lines,) in tables.get("bad lines", {}).items():
        yield "no document", lines, f"lines: {reason}"


def place(example: dict[str, Any]) -> str:
    """File and line."""
    return f"{example['file']}, line {example['line']:,}"
