"""`lamda dialog evaluate`: a saved model on held-out dialogues, before or after fine-tuning."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

import orjson

from lamda.config.errors import UserError
from lamda.dialog.options import add_tool_options, toolset_of
from lamda.dialog.report import check_picture, diagrams, draw, table


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog evaluate`."""
    parser = argparse.ArgumentParser(prog="lamda dialog evaluate", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or this one")
    parser.add_argument("--files", metavar="PATH", nargs="+", help="conversations instead of the run's validation text")
    parser.add_argument("--examples", metavar="N", type=int, help="number of examples, shuffled; default: all")
    parser.add_argument("--length", metavar="L", type=int, help="row length, to compare runs that differ in it")
    parser.add_argument(
        "--baselines", action="store_true",
        help="also two predictors trained on the ratings of the run's training files: TF-IDF, and length alone",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", metavar="SHARE", type=float,
        help="calibrate on these dialogues so that the filter refuses this share of safe responses, and store that",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="reliability diagrams as .png, .svg or .pdf")
    add_tool_options(parser, purpose="whose use to measure on the turns of these conversations")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda dialog evaluate --help` says; raises UserError."""
    options = parser().parse_args(argv)
    if options.examples is not None and options.examples < 1:
        raise UserError(f"--examples {options.examples}: give a number of at least 1")
    if options.calibrate is not None and not 0 <= options.calibrate < 1:
        raise UserError(f"--calibrate {options.calibrate}: give a share, from 0 to below 1")
    if options.plot is not None:
        check_picture(options.plot)
    from lamda.dialog import tool_use
    from lamda.dialog.evaluation import evaluate_checkpoint
    from lamda.inference.loading import find_checkpoint

    toolset = toolset_of(options)
    path = find_checkpoint(options.path)
    given = {"files": options.files, "examples": options.examples}
    tools = {} if toolset is None else tool_use.evaluate_tool_use(path, toolset, **given)
    report = evaluate_checkpoint(
        path,
        **given,
        length=options.length,
        false_refusals=options.calibrate,
        with_baselines=options.baselines,
    )
    report |= {"tools": tools} if tools else {}
    if options.json:
        finite = orjson.loads(orjson.dumps(report, default=list))  # null for NaN and infinity, which JSON lacks
        print(json.dumps(finite, indent=1))
    else:
        print("\n".join(chain(table(report), tool_use.table(tools), diagrams(report))))
    if options.plot is not None:
        draw(report, options.plot)
    return 0
