"""`lamda generate`: continue a text with a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lamda.config.errors import UserError
from lamda.console import visible

if TYPE_CHECKING:
    from lamda.inference.generation import Candidates
    from lamda.inference.loading import LoadedModel
    from lamda.inference.sampling import Sampling


def main(argv: list[str]) -> int:
    """As `lamda generate --help` says; raises UserError."""
    options = parser().parse_args(argv)
    from lamda.inference.generation import TextStream, prefill, sample
    from lamda.inference.loading import load_run

    loaded = load_run(options.run, int8=options.int8)
    tokenizer = loaded.tokenizer
    sampling = sampling_of(options, stop_ids=frozenset(tokenizer.symbols.values()))
    try:
        prompt_ids = tokenizer.encode(options.prompt)
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not valid UTF-8 text: give text in UTF-8") from error
    prefix = prefill(loaded.model, [tokenizer.end_of_document, *prompt_ids])
    if options.candidates == 1 and not options.json:
        stream = TextStream(tokenizer)
        sample(loaded.model, prefix, sampling=sampling, on_token=lambda _, id: _print(stream.add(id)))
        _print(stream.end() + "\n")
        return 0
    candidates = sample(loaded.model, prefix, count=options.candidates, sampling=sampling)
    if options.json:
        print(json.dumps(_report(options.prompt, candidates, loaded), ensure_ascii=False, indent=1))
    else:
        for number, ids in enumerate(candidates.ids):
            _print(f"--- {number}\n{options.prompt}{tokenizer.decode(ids)}\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `lamda generate`."""
    parser = argparse.ArgumentParser(prog="lamda generate", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an imported model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='text to continue; "" begins a document')
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="length limit; default %(default)s")
    add_sampling_options(parser)
    parser.add_argument("--candidates", type=int, default=1, metavar="N", help="continuations; default %(default)s")
    parser.add_argument("--int8", action="store_true", help="quantize the weights to 8 bits")
    parser.add_argument("--json", action="store_true", help="one JSON object: texts, ids, log probabilities")
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How to choose tokens, with the defaults of `Sampling`, whose module needs torch."""
    add = parser.add_argument
    add("--temperature", type=float, default=1.0, metavar="T", help="0: greedy decoding; default %(default)g")
    add("--top-k", type=int, default=40, metavar="K", help="sample from the K likeliest, 0: all; default %(default)s")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling after top-k; default %(default)g")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="default %(default)g: none")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text; default %(default)s")


def sampling_of(options: argparse.Namespace, *, stop_ids: frozenset[int] = frozenset()) -> Sampling:
    """The sampling that the options request; those that a command lacks keep their defaults. Raises UserError."""
    from lamda.inference.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Sampling(stop_ids=stop_ids, **{name: value for name, value in vars(options).items() if name in names})


def _print(text: str) -> None:
    """Without control characters at a terminal; unchanged in a pipe."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def _report(prompt: str, candidates: Candidates, loaded: LoadedModel) -> dict[str, object]:
    parts = zip(candidates.ids, candidates.log_probabilities, candidates.stopped, strict=True)
    return {
        "checkpoint": loaded.path.name,
        "prompt": prompt,
        "candidates": [
            {"text": loaded.tokenizer.decode(ids), "ids": ids, "log_probability": total, "stopped": stopped}
            for ids, total, stopped in parts
        ],
    }
