"""Command-line options of `lamda chat` and `lamda serve` for replies and tools."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lamda.config.loading import load_config
from lamda.dialog.research import MAX_QUERIES
from lamda.dialog.tools.toolset import NAMES, Toolset, open_toolset
from lamda.inference.command import sampling_of
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from lamda.dialog.speaker import ReplyOptions
    from lamda.inference.loading import LoadedModel

_log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands; the defaults are those of `ReplyOptions`, whose module needs torch."""
    add = parser.add_argument
    add("--candidates", type=int, default=16, metavar="N", help="samples per reply; default %(default)s")
    add(
        "--threshold", type=float, metavar="P",
        help="drop candidates with P(unsafe) above this; default: the calibration's, 0.5 without one",
    )  # fmt: skip
    add(
        "--refusal", default="I have no safe answer to that.", metavar="TEXT",
        help="reply if every candidate is dropped; default: %(default)s",
    )  # fmt: skip
    add_tool_options(parser, purpose="for the model to call before it answers")
    add("--force-tools", action="store_true", help="use the tools even if the model was not trained to use any")
    add("--max-queries", type=int, default=MAX_QUERIES, metavar="N", help="tool calls per reply; default %(default)s")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="length of a candidate; default %(default)s")
    add("--int8", action="store_true", help="quantize the weights to 8 bits")


def add_tool_options(parser: argparse.ArgumentParser, *, purpose: str) -> None:
    """The options that `toolset_of` reads."""
    add = parser.add_argument
    add(
        "--tools", type=lambda names: names.split(","), metavar="NAMES",
        help=f"some of {','.join(NAMES)}, {purpose}",
    )  # fmt: skip
    add(
        "--corpus", type=Path, metavar="PATH",
        help="a folder (.txt .md .rst .py .jsonl) or a JSON-lines file that the retrieval tool searches",
    )  # fmt: skip
    add(
        "--glossary", type=Path, metavar="FILE",
        help="JSON lines of translations for the translator tool, instead of Argos Translate's models",
    )  # fmt: skip


def reply_options_of(options: argparse.Namespace) -> ReplyOptions:
    """The reply options. Raises UserError for invalid ones."""
    from lamda.dialog.speaker import ReplyOptions

    return ReplyOptions(
        candidates=options.candidates,
        **({} if options.threshold is None else {"threshold": options.threshold}),
        max_queries=options.max_queries,
        refusal=options.refusal,
        sampling=sampling_of(options),
    )


def calibrated(options: ReplyOptions, loaded: LoadedModel, *, threshold: float | None) -> ReplyOptions:
    """The options with the calibration of a fine-tuned checkpoint, and its threshold unless one is given.

    Logs why there is no calibration or no filter. Raises UserError for a damaged calibration.
    """
    if loaded.config.data.packing != "whole":
        return options
    from lamda.dialog.calibration import NO_FILTER, Calibration

    calibration = Calibration.read(loaded.path)
    if calibration is None and threshold is None:
        _log.warning(
            "%s has no calibration: the safety filter drops P(unsafe) above %g, whatever that means for this model; "
            "`lamda dialog evaluate RUN --calibrate 0.05` finds a threshold on held-out ratings and stores it",
            loaded.path,
            options.threshold,
        )
    if calibration is None:
        return options
    if threshold is None:
        threshold = calibration.threshold
        if threshold == NO_FILTER:
            _log.warning("%s; --threshold P sets one", calibration.filter_note)
    return replace(options, calibration=calibration, threshold=threshold)


def toolset_of(options: argparse.Namespace) -> Toolset | None:
    """The tools, or None if none is given. Raises UserError if one lacks a package, model or file."""
    if options.tools is None and options.corpus is None and options.glossary is None:
        return None
    return open_toolset(options.tools or [], corpus=options.corpus, glossary=options.glossary)


def usable_tools(toolset: Toolset | None, checkpoint: Path, *, forced: bool = False) -> Toolset | None:
    """The tools, or None with a logged warning if the model was not trained to use them, unless `forced`."""
    if toolset is None or forced or knows_tools(checkpoint) is not False:
        return toolset
    _log.warning(
        "%s was not trained to use tools; they are disabled. Fine-tune it with conversations that use them, "
        "such as those of `lamda dialog make-tool-data`, or force their use with --force-tools",
        checkpoint,
    )
    return None


def knows_tools(checkpoint: Path) -> bool | None:
    """Whether its run, or a run that it started from, was trained on research steps, by their `metrics.jsonl`.

    None if the metrics of a run are missing.
    """
    seen: set[Path] = set()
    while (checkpoint / "config.yaml").is_file() and checkpoint not in seen:
        seen.add(checkpoint)
        config = load_config(["--config", str(checkpoint / "config.yaml")])
        if config.data.packing != "whole":
            return False
        rows = read_metrics(RunDirectory(checkpoint.parent.parent).metrics)
        if not rows:
            return None
        if any(row.get("tokens/research") for row in rows):
            return True
        if config.model.weights is None:
            return False
        checkpoint = Path(config.model.weights).parent
    return None
