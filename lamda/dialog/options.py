"""What `lamda chat` and `lamda serve` let a user say about how to answer."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lamda.config.loading import load_config
from lamda.dialog.speaker import Manner
from lamda.dialog.tools.toolset import Toolset, open_toolset
from lamda.inference.sampling import Sampling
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory

_log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lamda.dialog.usage.DETAILS`."""
    manner = Manner()
    parser.add_argument("--candidates", type=int, default=manner.candidates)
    parser.add_argument("--threshold", type=float, default=manner.threshold)
    parser.add_argument("--refusal", default=manner.refusal)
    parser.add_argument("--tools", type=lambda names: names.split(","))
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--glossary", type=Path)
    parser.add_argument("--max-queries", type=int, default=manner.max_queries)
    parser.add_argument("--max-new-tokens", type=int, default=manner.sampling.max_new_tokens)
    parser.add_argument("--int8", action="store_true")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lamda.dialog.usage.SAMPLING`, which requests to a server carry themselves."""
    sampling = Sampling()
    parser.add_argument("--temperature", type=float, default=sampling.temperature)
    parser.add_argument("--top-k", type=int, default=sampling.top_k)
    parser.add_argument("--top-p", type=float, default=sampling.top_p)
    parser.add_argument("--repetition-penalty", type=float, default=sampling.repetition_penalty)
    parser.add_argument("--seed", type=int, default=sampling.seed)


def manner_of(options: argparse.Namespace) -> Manner:
    """How to answer. Raises UserError where it cannot be."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Manner(
        candidates=options.candidates,
        threshold=options.threshold,
        max_queries=options.max_queries,
        refusal=options.refusal,
        sampling=Sampling(**{name: value for name, value in vars(options).items() if name in names}),
    )


def toolset_of(options: argparse.Namespace) -> Toolset | None:
    """The tools, or None where none is named. Raises UserError where one lacks what it works with."""
    if options.tools is None and options.corpus is None and options.glossary is None:
        return None
    return open_toolset(options.tools or [], corpus=options.corpus, glossary=options.glossary)


def usable_tools(toolset: Toolset | None, checkpoint: Path) -> Toolset | None:
    """The tools, or None, with a warning in the log, where the model was not taught to use any."""
    if toolset is None or was_taught_tools(checkpoint) is not False:
        return toolset
    _log.warning(
        "%s was not taught to use tools and goes without them: fine-tune it with conversations that use them, "
        "such as `lamda dialog research-data` makes",
        checkpoint,
    )
    return None


def was_taught_tools(checkpoint: Path) -> bool | None:
    """Whether its run, or one that this began from, has learned steps of research, by their `metrics.jsonl`.

    None where a run is not there to say so, and for one that was only pre-trained, which uses no tools in any case.
    """
    learned: bool | None = None
    seen: set[Path] = set()
    while (checkpoint / "config.yaml").is_file() and checkpoint not in seen:
        seen.add(checkpoint)
        config = load_config(["--config", str(checkpoint / "config.yaml")])
        if config.data.packing != "whole":
            return learned
        rows = read_metrics(RunDirectory(checkpoint.parent.parent).metrics)
        if not rows:
            return None
        if any(row.get("tokens/research") for row in rows):
            return True
        learned = False
        if config.model.weights is None:
            return learned
        checkpoint = Path(config.model.weights).parent
    return None
