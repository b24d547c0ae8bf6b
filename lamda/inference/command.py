"""`lamda generate`: continue a text with a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import visible
from lamda.inference.generation import Candidates, TextStream, prefill, sample
from lamda.inference.loading import LoadedModel, load_run
from lamda.inference.sampling import Sampling


def main(argv: list[str]) -> int:
    """`lamda generate`; see its `--help`. Raises UserError."""
    options = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    default = Sampling()
    parser = argparse.ArgumentParser(prog="lamda generate", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=default.temperature)
    parser.add_argument("--top-k", type=int, default=default.top_k)
    parser.add_argument("--top-p", type=float, default=default.top_p)
    parser.add_argument("--repetition-penalty", type=float, default=default.repetition_penalty)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser


class _Stream:
    """Prints the text of a single candidate while it is generated."""

    def __init__(self, loaded: LoadedModel) -> None:
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
