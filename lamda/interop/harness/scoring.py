"""What the harness asks of a model: the nats of given tokens, and greedy or sampled continuations, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lamda.data.tokenizer import Tokenizer
from lamda.inference.generation import Candidates, TextStream, advance, prefill
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.loss import token_nats

Logits = Callable[[torch.Tensor], torch.Tensor]
"""inputs_BL -> logits_BLV, on the model's device."""


class Row(NamedTuple):
    """At most sequence_length + 1 tokens, of which the last `scored` are judged by those before them."""

    ids: list[int]
    scored: int


class Score(NamedTuple):
    """Of a row's judged tokens: the sum of their nats, and whether each was the likeliest."""

    nats: float
    is_greedy: bool


class Prompt(NamedTuple):
    """What is continued, how, and the texts before which the continuation ends."""

    ids: list[int]
    sampling: Sampling
    until: tuple[str, ...]


class Decoder(Protocol):
    """A model as the harness uses it. batch: how many rows or prompts go together."""

    batch: int

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """The score of each row."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The continuation of each prompt."""
        ...


@dataclass(frozen=True)
class LocalDecoder:
    """A model in this process."""

    model: LaMDA
    tokenizer: Tokenizer
    batch: int

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[Score]:
        """See `Decoder`."""
        return score_rows(self.model, rows, device=self.model.final_norm.scale.device)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `Decoder`."""
        return continue_prompts(self.model, self.tokenizer, prompts)


def windows(context: Sequence[int], tokens: Sequence[int], *, length: int) -> Iterator[Row]:
    """Rows that judge each of `tokens` once, after as much of what precedes it as fits into `length` inputs.

    These are lm-eval's rolling windows: whole rows that overlap by one token, the last one moved back so that it
    is full as well. context: what precedes all tokens, one token at least.
    """
    whole = [*context, *tokens]
    for start in range(0, len(tokens), length):
        scored = min(length, len(tokens) - start)
        end = len(context) + start + scored
        yield Row(whole[max(0, end - length - 1) : end], scored)


def score_rows(logits: Logits, rows: Sequence[Row], *, device: torch.device) -> list[Score]:
    """Score rows of any lengths in one pass."""
    longest = max(len(row.ids) for row in rows)
    ids_NL = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows], device=device)
    logits_NLV = logits(ids_NL[:, :-1])
    nats_NL = token_nats(logits_NLV, ids_NL[:, 1:]).double().cpu()
    is_likeliest_NL = (logits_NLV.argmax(dim=-1) == ids_NL[:, 1:]).cpu()
    places = [slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for row in rows]
    return [
        Score(float(nats_L[place].sum()), bool(is_likeliest_L[place].all()))
        for nats_L, is_likeliest_L, place in zip(nats_NL, is_likeliest_NL, places, strict=True)
    ]


def continue_prompts(model: LaMDA, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Continue prompts together; each ends before the first of its texts that comes, or at the end of a document."""
    writers = [_Writer(tokenizer, prompt.until) for prompt in prompts]
    groups = [
        Candidates(model, prefill(model, prompt.ids), count=1, sampling=prompt.sampling, on_token=writer.take)
        for prompt, writer in zip(prompts, writers, strict=True)
    ]
    while running := [group for group in groups if not group.finished]:
        advance(model, running)
    return [writer.text() for writer in writers]


class _Writer:
    """The text of a continuation as it comes."""

    def __init__(self, tokenizer: Tokenizer, until: tuple[str, ...]) -> None:
        self._stream, self._until, self._text = TextStream(tokenizer), until, ""

    def take(self, number: int, id: int) -> bool:
        """Add a token; whether one of the texts that end it has come."""
        self._text += self._stream.add(id)
        return any(end in self._text for end in self._until)

    def text(self) -> str:
        """All of it, cut before the first text that ends it."""
        whole = self._text + self._stream.end()
        return whole[: min((place for end in self._until if (place := whole.find(end)) >= 0), default=len(whole))]
