"""Our decoder as a language model of lm-eval's: texts to tokens, tokens to rows, rows to batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from lamda.data.tokenizer import Tokenizer
from lamda.inference.sampling import Sampling, check_finite
from lamda.interop.harness.scoring import Decoder, Prompt, Row, Score, windows
from lamda.training.task import Shows

R = TypeVar("R")

NEW_TOKENS = 256
"""What a model may write where a task does not say, as lm-eval has it."""


def _aloud(shows: Shows) -> Shows:
    """The same into the streams of now, whatever is redirected when it is used: lm-eval itself is kept quiet."""
    out, err = sys.stdout, sys.stderr

    @contextmanager
    def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with redirect_stdout(out), redirect_stderr(err), shows(what, total) as advance:
            yield advance

    return shown


@contextmanager
def _silently(what: str, total: int) -> Iterator[Callable[[int], None]]:
    del what, total
    yield lambda more: None


class HarnessModel(LM):
    """What lm-eval calls. Every text begins a document, after the end of another, as in training.

    sequence_length: inputs of a row; longer texts are read in lm-eval's rolling windows, and a prompt keeps its
    last ones. Rows go through the decoder sorted, the longest first, so that a batch holds little padding.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, *, sequence_length: int, shows: Shows = _silently
    ) -> None:
        super().__init__()
        self._decoder, self._tokenizer = decoder, tokenizer
        self._length, self._shows = sequence_length, _aloud(shows)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): ln P(continuation | context), and whether greedy decoding writes it."""
        pairs = [self._split(*request.args) for request in requests]
        return [(-score.nats, score.is_greedy) for score in self._score(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each text: ln P(text)."""
        pairs = [self._split("", request.args[0]) for request in requests]
        return [-score.nats for score in self._score(pairs)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Of each (context, options of generation): the continuation, up to the first of the texts in `until`."""
        prompts = [self._prompt(*request.args, seed=number) for number, request in enumerate(requests)]
        return self._in_batches("continuations", prompts, self._decoder.generate)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, cut where those of the whole and of the context alone part ways.

        Spaces that end the context belong to the word after them.
        """
        kept = context.rstrip()
        before = self._tokenizer.encode(kept)
        whole = self._tokenizer.encode(context + continuation)
        pairs = enumerate(zip(before, whole, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(before), len(whole)))
        return [self._tokenizer.end_of_document, *whole[:shared]], whole[shared:]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """The score of each pair's second part, over all its rows."""
        rows, owners = [], []
        for number, (context, tokens) in enumerate(pairs):
            own = list(windows(context, tokens, length=self._length))
            rows += own
            owners += [number] * len(own)
        found = [Score(0.0, is_greedy=True)] * len(pairs)
        for owner, score in zip(owners, self._in_batches("rows", rows, self._decoder.score), strict=True):
            found[owner] = Score(found[owner].nats + score.nats, found[owner].is_greedy and score.is_greedy)
        for score in found:
            check_finite(score.nats)  # a comparison with NaN would still choose an answer
        return found

    def _prompt(self, context: str, options: dict[str, Any], *, seed: int) -> Prompt:
        """lm-eval's options of generation as ours; greedy where they do not ask for sampling."""
        asked = normalize_gen_kwargs(options, default_max_gen_toks=NEW_TOKENS)
        sampling = Sampling(
            max_new_tokens=asked["max_gen_toks"],
            temperature=float(asked.get("temperature", 1.0)) if asked["do_sample"] else 0.0,
            top_k=int(asked.get("top_k", 0)),
            top_p=float(asked.get("top_p", 1.0)),
            seed=seed,
            stop_ids=frozenset({self._tokenizer.end_of_document}),
        )
        ids = [self._tokenizer.end_of_document, *self._tokenizer.encode(context)]
        return Prompt(ids[-self._length :], sampling, tuple(filter(None, asked["until"])))

    def _in_batches(
        self, what: str, items: Sequence[Row] | Sequence[Prompt], action: Callable[[Sequence[Any]], list[R]]
    ) -> list[R]:
        """The action's result for each item, given to it in batches of similar length, the longest first."""
        order = sorted(range(len(items)), key=lambda place: len(items[place].ids), reverse=True)
        found: dict[int, R] = {}
        with self._shows(what, len(items)) as advance:
            for start in range(0, len(order), self._decoder.batch):
                places = order[start : start + self._decoder.batch]
                found.update(zip(places, action([items[place] for place in places]), strict=True))
                advance(len(places))
        return [found[place] for place in range(len(items))]
