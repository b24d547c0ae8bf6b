"""`lamda data clean`: write the list of documents to leave out of training (`data.drop`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamda.audit.options import add_text_options, collected, names
from lamda.config.errors import UserError

if TYPE_CHECKING:
    from lamda.audit.findings import Findings
    from lamda.audit.records import Shards

REASONS = ("overlap", "empty", "pii", "exact", "near")


def parser() -> argparse.ArgumentParser:
    """The options of `lamda data clean`."""
    parser = argparse.ArgumentParser(prog="lamda data clean", allow_abbrev=False)
    add_text_options(parser)
    add = parser.add_argument
    add("--to", type=Path, required=True, metavar="LIST", help="the list, for data.drop; an existing file is kept")
    add(
        "--drop",
        metavar="REASONS",
        help=f"of {', '.join(REASONS)}; default: exact, near, empty and, with --against, overlap",
    )
    return parser


def main(argv: list[str]) -> int:
    """See `parser`; raises UserError."""
    options = parser().parse_args(argv)
    chosen = names(options.drop, REASONS, "--drop") if options.drop else {"exact", "near", "empty"}
    if not options.drop and options.against:
        chosen.add("overlap")
    from lamda.audit.findings import find
    from lamda.audit.records import require_new

    require_new(options.to)
    with collected(options, chosen & {"near", "pii"}) as shards:
        chosen = _available(shards, chosen, is_default=not options.drop)
        findings = find(shards, chosen)
        _write(options.to, findings)
    counts = {name: count for name, count in findings.counts().items() if name in chosen}
    if options.json:
        found = {name: {"documents": documents, "bytes": size} for name, (documents, size) in counts.items()}
        print(json.dumps({"list": str(options.to), "documents": len(shards.documents), "drop": found}, indent=1))
    else:
        _show(options.to, counts, shards)
    return 0


def _available(shards: Shards, chosen: set[str], *, is_default: bool) -> set[str]:
    """The reasons that the shards can decide. Raises UserError if a chosen one is missing."""
    summary = shards.summaries[0]
    can = {"exact", "empty", *summary["options"]["parts"], *([] if summary["evaluation"] is None else ["overlap"])}
    if is_default:
        return (chosen | {"overlap"}) & can
    if missing := sorted(chosen - can):
        remedy = "--against names evaluation text" if missing[0] == "overlap" else "audit the shards with it"
        raise UserError(f"--drop {missing[0]}: was not looked for; {remedy}")
    return chosen


def _write(target: Path, findings: Findings) -> None:
    from lamda.data.drop_list import lines_of
    from lamda.durable import create_file

    header: dict[str, Any] = {"files": findings.shards.summaries[0]["files"]}
    try:
        create_file(target, lines_of(header, findings.entries()))
    except FileExistsError as error:
        raise UserError(f"{target} exists already; name another one, or remove it") from error
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error


def _show(target: Path, counts: dict[str, tuple[int, int]], shards: Shards) -> None:
    from lamda.audit.findings import REASONS as MEANINGS
    from lamda.console import show_table

    every = int(shards.documents["size"].sum())
    rows = [
        [MEANINGS[name], f"{documents:,}", f"{size:,}", f"{size / max(1, every):.2%}"]
        for name, (documents, size) in counts.items()
    ]
    show_table(["reason", "documents", "bytes", "share"], rows)
    documents = sum(count for count, _ in counts.values())
    print(f"{target}: leaves out {documents:,} of {len(shards.documents):,} documents; train with data.drop: {target}")
