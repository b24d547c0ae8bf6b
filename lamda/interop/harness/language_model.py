"""LaMDA as a language model of lm-eval: texts to tokens, tokens to rows, rows to batches."""

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
from lamda.interop.harness.scoring import Decoder, Prompt, Score, ScoredRow, windows
from lamda.training.task import ShowProgress

R = TypeVar("R")

NEW_TOKENS = 256
"""Default maximum of new tokens, as in lm-eval."""


def _past_redirection(show_progress: ShowProgress) -> ShowProgress:
    """The same progress, written to the current streams even while the output of lm-eval is redirected."""
    out, err = sys.stdout, sys.stderr

    @contextmanager
    def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with redirect_stdout(out), redirect_stderr(err), show_progress(what, total) as advance:
            yield advance

    return shown


class HarnessModel(LM):  # type: ignore[misc]  # lm_eval has no types
    """The model that lm-eval calls. Every text begins a document, after EOS, as in training.

    sequence_length: inputs of a row; longer texts are scored in lm-eval's rolling windows, and a prompt keeps its
    last ones. Rows are sorted, the longest first, so that a batch has little padding.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, *, sequence_length: int, show_progress: ShowProgress
    ) -> None:
        super().__init__()
        self._decoder, self._tokenizer = decoder, tokenizer
        self._length, self._show_progress = sequence_length, _past_redirection(show_progress)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln P(continuation | context), and whether it is the greedy one."""
        pairs = [self._split(*request.args) for request in requests]
        return [(-score.nats, score.is_greedy) for score in self._score(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For each text: ln P(text)."""
        pairs = [self._split("", request.args[0]) for request in requests]
        return [-score.nats for score in self._score(pairs)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, generation options): the continuation, up to the first stop string in `until`."""
        prompts = [self._prompt(*request.args, seed=number) for number, request in enumerate(requests)]
        return self._in_batches("continuations", prompts, self._decoder.generate)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, cut where those of the whole and of the context alone diverge.

        Spaces that end the context belong to the word after them.
        """
        kept = context.rstrip()
        before = self._tokenizer.encode(kept)
        whole = self._tokenizer.encode(context + continuation)
        pairs = enumerate(zip(before, whole, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(before), len(whole)))
        return [self._tokenizer.end_of_document, *whole[:shared]], whole[shared:]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """The score of each pair's continuation, over all its rows."""
        rows, owners = [], []
        for number, (context, tokens) in enumerate(pairs):
            parts = list(windows(context, tokens, length=self._length))
            rows += parts
            owners += [number] * len(parts)
        found = [Score(0.0, is_greedy=True)] * len(pairs)
        for owner, score in zip(owners, self._in_batches("rows", rows, self._decoder.score), strict=True):
            found[owner] = Score(found[owner].nats + score.nats, found[owner].is_greedy and score.is_greedy)
        for score in found:
            check_finite(score.nats)  # a comparison with NaN would still pick an answer
        return found

    def _prompt(self, context: str, options: dict[str, Any], *, seed: int) -> Prompt:
        """lm-eval's generation options as a `Prompt`; greedy unless they request sampling."""
        request = normalize_gen_kwargs(options, default_max_gen_toks=NEW_TOKENS)
        sampling = Sampling(
            max_new_tokens=request["max_gen_toks"],
            temperature=float(request.get("temperature", 1.0)) if request["do_sample"] else 0.0,
            top_k=int(request.get("top_k", 0)),
            top_p=float(request.get("top_p", 1.0)),
            seed=seed,
            stop_ids=frozenset({self._tokenizer.end_of_document}),
        )
        ids = [self._tokenizer.end_of_document, *self._tokenizer.encode(context)]
        return Prompt(ids[-self._length :], sampling, tuple(filter(None, request["until"])))

    def _in_batches(
        self, what: str, items: Sequence[ScoredRow] | Sequence[Prompt], action: Callable[[Sequence[Any]], list[R]]
    ) -> list[R]:
        """The action's result for each item, in batches of similar length, the longest first."""
        order = sorted(range(len(items)), key=lambda place: len(items[place].ids), reverse=True)
        found: dict[int, R] = {}
        with self._show_progress(what, len(items)) as advance:
            for start in range(0, len(order), self._decoder.batch):
                places = order[start : start + self._decoder.batch]
                found.update(zip(places, action([items[place] for place in places]), strict=True))
                advance(len(places))
        return [found[place] for place in range(len(items))]
