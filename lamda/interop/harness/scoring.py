"""The harness's requests to a model: scores of given tokens, and greedy or sampled continuations, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lamda.data.tokenizer import Tokenizer
from lamda.inference.generation import Candidates, TextStream, finish, prefill
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.loss import token_nll

Logits = Callable[[torch.Tensor], torch.Tensor]
"""inputs_BL -> logits_BLV, on the model's device."""


class ScoredRow(NamedTuple):
    """At most sequence_length + 1 tokens, of which the last `scored` are targets."""

    ids: list[int]
    scored: int


class Score(NamedTuple):
    """The summed nats of a row's targets, and whether each has the highest probability."""

    nats: float
    is_greedy: bool


class Prompt(NamedTuple):
    """The ids to continue, how, and the stop strings."""

    ids: list[int]
    sampling: Sampling
    until: tuple[str, ...]


class Decoder(Protocol):
    """A model for the harness. batch: rows or prompts per call."""

    batch: int

    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """The score of each row."""
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The continuation of each prompt."""
        ...


@dataclass
class LocalDecoder:
    """A model in this process."""

    model: LaMDA
    tokenizer: Tokenizer
    batch: int

    @torch.no_grad()
    def score(self, rows: Sequence[ScoredRow]) -> list[Score]:
        """See `Decoder`."""
        return score_rows(self.model, rows, device=self.model.final_norm.scale.device)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `Decoder`."""
        return continue_prompts(self.model, self.tokenizer, prompts)


def windows(context: Sequence[int], tokens: Sequence[int], *, length: int) -> Iterator[ScoredRow]:
    """Rows that score each of `tokens` once, with as much context as fits into `length` inputs.

    These are lm-eval's rolling windows: full rows that overlap by one token, the last one moved back so that it
    is full too. context: at least one token before `tokens`.
    """
    whole = [*context, *tokens]
    for start in range(0, len(tokens), length):
        scored = min(length, len(tokens) - start)
        end = len(context) + start + scored
        yield ScoredRow(whole[max(0, end - length - 1) : end], scored)


def score_rows(logits: Logits, rows: Sequence[ScoredRow], *, device: torch.device) -> list[Score]:
    """Score rows of any lengths in one forward pass."""
    longest = max(len(row.ids) for row in rows)
    ids_NL = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows], device=device)
    logits_NLV = logits(ids_NL[:, :-1])
    nats_NL = token_nll(logits_NLV, ids_NL[:, 1:]).double().cpu()
    is_likeliest_NL = (logits_NLV.argmax(dim=-1) == ids_NL[:, 1:]).cpu()
    places = [slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for row in rows]
    return [
        Score(float(nats_L[place].sum()), bool(is_likeliest_L[place].all()))
        for nats_L, is_likeliest_L, place in zip(nats_NL, is_likeliest_NL, places, strict=True)
    ]


def continue_prompts(model: LaMDA, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Continue prompts as one batch; each ends before its first stop string, or at the end of the document."""
    streams = [TextStream(tokenizer, prompt.until) for prompt in prompts]

    def begin(prompt: Prompt, stream: TextStream) -> Candidates:
        def on_token(_: int, id: int) -> bool:
            stream.add(id)
            return stream.stopped

        return Candidates(model, prefill(model, prompt.ids), count=1, sampling=prompt.sampling, on_token=on_token)

    finish(model, list(map(begin, prompts, streams)))
    for stream in streams:
        stream.end()
    return [stream.text for stream in streams]
