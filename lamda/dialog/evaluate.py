"""`lamda dialog evaluate`: a saved model on held-out dialogues, before or after fine-tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import orjson

from lamda.config.errors import UserError
from lamda.dialog.options import add_tool_options, toolset_of


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog evaluate`."""
    parser = argparse.ArgumentParser(prog="lamda dialog evaluate", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or this one")
    parser.add_argument("--files", metavar="PATH", nargs="+", help="conversations instead of the run's validation text")
    parser.add_argument("--examples", metavar="N", type=int, help="number of examples, shuffled; default: all")
    parser.add_argument("--length", metavar="L", type=int, help="row length, to compare runs that differ in it")
    add_tool_options(parser, purpose="whose use to measure on the turns of these conversations")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda dialog evaluate --help` says; raises UserError."""
    options = parser().parse_args(argv)
    if options.examples is not None and options.examples < 1:
        raise UserError(f"--examples {options.examples}: give a number of at least 1")
    from lamda.dialog import tool_use
    from lamda.dialog.evaluation import evaluate_checkpoint, table
    from lamda.inference.loading import find_checkpoint

    toolset = toolset_of(options)
    path = find_checkpoint(options.path)
    given = {"files": options.files, "examples": options.examples}
    tools = {} if toolset is None else tool_use.evaluate_tool_use(path, toolset, **given)
    report = evaluate_checkpoint(path, **given, length=options.length)
    report |= {"tools": tools} if tools else {}
    finite = orjson.loads(orjson.dumps(report))  # null for NaN and infinity, which JSON lacks
    lines = [*table(report), *tool_use.table(tools)]
    print(json.dumps(finite, indent=1) if options.json else "\n".join(lines))
    return 0
