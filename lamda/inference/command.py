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


def main(argv: list[str]) -> int:
    """As `lamda generate --help` says; raises UserError."""
    options = parser().parse_args(argv)
    from lamda.inference.generation import prefill, sample
    from lamda.inference.loading import load_run
    from lamda.inference.sampling import Sampling

    loaded = load_run(options.run, int8=options.int8)
    tokenizer = loaded.tokenizer
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=frozenset(tokenizer.symbols.values()),
    )
    try:
        prompt_ids = tokenizer.encode(options.prompt)
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not valid UTF-8 text: give text in UTF-8") from error
    prefix = prefill(loaded.model, [tokenizer.end_of_document, *prompt_ids])
    stream = _Stream(loaded) if options.candidates == 1 and not options.json else None
    candidates = sample(loaded.model, prefix, count=options.candidates, sampling=sampling, on_token=stream)
    if options.json:
        print(json.dumps(_report(options.prompt, candidates, loaded), ensure_ascii=False, indent=1))
    elif stream is not None:
        stream.end()
    else:
        for number, ids in enumerate(candidates.ids):
            print(f"--- {number}\n{_shown(options.prompt + tokenizer.decode(ids))}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `lamda generate`."""
    parser = argparse.ArgumentParser(prog="lamda generate", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an imported model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='text to continue; "" begins a document')
    add_sampling_options(parser)
    parser.add_argument("--candidates", type=int, default=1, metavar="N", help="continuations; default %(default)s")
    parser.add_argument("--int8", action="store_true", help="quantize the weights to 8 bits")
    parser.add_argument("--json", action="store_true", help="one JSON object: texts, ids, log probabilities")
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Sampling`, with its defaults, whose module needs torch."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="length limit; default %(default)s")
    add("--temperature", type=float, default=1.0, metavar="T", help="0: greedy decoding; default %(default)g")
    add(
        "--top-k",
        type=int,
        default=40,
        metavar="K",
        help="sample from the K likeliest, 0: all; default %(default)s",
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling after top-k; default %(default)g")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="default %(default)g: none")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text; default %(default)s")


class _Stream:
    """Prints the text of a single candidate while it is generated."""

    def __init__(self, loaded: LoadedModel) -> None:
        from lamda.inference.generation import TextStream

        self._text = TextStream(loaded.tokenizer)

    def __call__(self, _: int, id: int) -> None:
        self._write(self._text.add(id))

    def end(self) -> None:
        self._write(self._text.end() + "\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(_shown(text))
        sys.stdout.flush()


def _shown(text: str) -> str:
    """Text without control characters if it goes to a terminal; unchanged in a pipe."""
    return visible(text) if sys.stdout.isatty() else text


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
