"""What `lamda chat` and `lamda serve` let a user say about how to answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from lamda.dialog.speaker import Manner
from lamda.dialog.tools.toolset import Toolset, open_toolset
from lamda.inference.sampling import Sampling


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
