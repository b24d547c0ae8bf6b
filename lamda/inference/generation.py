"""Generating continuations of prompts, and scoring given ones, with a key-value cache.

    prefix = prefill(model, ids)                        # computed once
    candidates = sample(model, prefix, count=16)        # all share the prefix
    candidates.next_logits([symbol])                    # after each candidate and a symbol

Several groups of candidates are batched together (`advance`); groups may join and leave between steps.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lamda.config.errors import UserError
from lamda.data.tokenizer import Tokenizer
from lamda.inference.cache import CHUNK, Prefix, Rows, feed, layers
from lamda.inference.sampling import Sampler, Sampling
from lamda.model import LaMDA

Result = TypeVar("Result")

_EXTRA_TOKENS = 4
"""Tokens after a candidate for which the cache reserves room, for `next_logits`."""

OnToken = Callable[[int, int], bool | None]
"""Called with each new id: (number of the candidate, id); True ends the candidate after it."""


class Candidates:
    """Continuations of one prefix, being sampled or finished.

    Attributes:
        ids: the tokens of each, without the stop id.
        log_probabilities: sum over ids and stop id, under the unmodified distribution of the model.
        stopped: whether each ended by one of `stop_ids` or by `on_token`, not by its length.
    """

    def __init__(
        self, model: LaMDA, prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None
    ) -> None:
        """Chooses the first token of each."""
        if count < 1:
            raise UserError(f"the number of candidates is {count}: give at least 1")
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.log_probabilities = [0.0] * count
        self.stopped = [False] * count
        self.rows = Rows(model, count=count, most=sampling.max_new_tokens + _EXTRA_TOKENS, prefix=prefix)
        self._model, self._sampling, self._on_token, self._steps = model, sampling, on_token, 0
        self._sampler = Sampler(sampling, prompt=prefix.ids, count=count, logits=prefix.logits_V)
        self.take(prefix.logits_V.expand(count, -1))

    @property
    def finished(self) -> bool:
        """Whether all candidates have ended."""
        return self._steps == self._sampling.max_new_tokens or all(self.stopped)

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [count, V] of the token after each candidate (without stop id) followed by `ids`; changes nothing."""
        if not ids and not all(self._missing()):
            raise ValueError("nothing follows the candidates: give at least one id")
        return feed(self._model, [self.rows], [[*missing, *ids] for missing in self._missing()])

    def _missing(self) -> list[list[int]]:
        """The ids of each candidate that are not in the cache yet: at most the last one."""
        return [ids[length:] for ids, length in zip(self.ids, self.rows.lengths, strict=True)]

    def take(self, logits_NV: Tensor) -> None:
        """Choose a token for each unfinished candidate from the logits of `forward`. Raises NotFiniteError."""
        self.rows.lengths = [len(ids) for ids in self.ids]
        chosen, log_probabilities = self._sampler.choose(logits_NV, self._steps)
        self._steps += 1
        for number, (id, log_probability) in enumerate(zip(chosen, log_probabilities, strict=True)):
            if self.stopped[number]:
                continue
            self.log_probabilities[number] += log_probability
            self.stopped[number] = id in self._sampling.stop_ids
            if not self.stopped[number]:
                self.ids[number].append(id)
                self.stopped[number] = bool(self._on_token and self._on_token(number, id))


@torch.no_grad()
def forward(model: LaMDA, groups: Sequence[Candidates]) -> Sequence[Tensor]:
    """The logits [count, V] of the next tokens of each unfinished group, in one batch.

    Pass them to `take` of each group. Until then nothing has changed, and the call can be repeated.
    """
    tokens = [missing or [0] for group in groups for missing in group._missing()]
    logits_NV = feed(model, [group.rows for group in groups], tokens)
    return logits_NV.split([len(group.rows) for group in groups])


def advance(model: LaMDA, groups: Sequence[Candidates]) -> None:
    """Generate one token for every unfinished candidate of the unfinished groups, in one batch."""
    for group, logits_NV in zip(groups, forward(model, groups), strict=True):
        group.take(logits_NV)


def finish(model: LaMDA, groups: Sequence[Candidates]) -> None:
    """Generate until all candidates of all groups have ended, in one batch."""
    while running := [group for group in groups if not group.finished]:
        advance(model, running)


Pieces = Generator[None, None, Result]
"""Work on the model in pieces of at most CHUNK tokens per row; the caller may do other work, or stop, in between."""


class Run(Protocol):
    """Runs pieces; a server runs those of several requests in turn."""

    def __call__(self, pieces: Pieces[Result], *, tokens: int = 0) -> Result:
        """The result of the pieces. tokens: about how many they compute, for scheduling."""
        ...


def whole(pieces: Pieces[Result], *, tokens: int = 0) -> Result:
    """Run all pieces, one after another."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return cast(Result, end.value)


def prefill(model: LaMDA, ids: Sequence[int]) -> Prefix:
    """Compute the keys and values of a prompt. Raises UserError if it is empty."""
    return whole(prefill_pieces(model, ids))


@torch.no_grad()
def prefill_pieces(model: LaMDA, ids: Sequence[int], *, start: Prefix | None = None, shared: int = 0) -> Pieces[Prefix]:
    """`prefill` in pieces. `start` begins with the same `shared` tokens, fewer than all, and gives theirs."""
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    rows = Rows(model, count=1, most=len(ids))
    if start is not None:
        rows.copy(start, shared)
    for begin in range(shared, len(ids), CHUNK):
        if begin > shared:
            yield
        chunk = ids[begin : begin + CHUNK]
        logits_NV = feed(model, [rows], [chunk])
        rows.lengths[0] += len(chunk)
    return rows.as_prefix(ids, logits_NV[0], cached=shared)


def sample(
    model: LaMDA, prefix: Prefix, *, count: int = 1, sampling: Sampling, on_token: OnToken | None = None
) -> Candidates:
    """`count` independent continuations of a prefix. Raises UserError if count is less than 1.

    Candidate c depends only on the prefix, the sampling and c: the first 4 of 16 are the same as 4 of 4.
    """
    candidates = Candidates(model, prefix, count=count, sampling=sampling, on_token=on_token)
    finish(model, [candidates])
    return candidates


@torch.no_grad()
def score_pieces(model: LaMDA, prefix: Prefix, continuations: Sequence[Sequence[int]]) -> Pieces[list[float]]:
    """The log probability of each continuation after the prefix. Raises ValueError if one is empty."""
    if not all(continuations):
        raise ValueError("a continuation without tokens has nothing to score")
    device, longest = prefix.logits_V.device, max(map(len, continuations)) - 1
    padded = [[*ids, *[0] * (longest + 1 - len(ids))] for ids in continuations]
    ids_NL = torch.tensor(padded, device=device)
    wide_V = prefix.logits_V.to(torch.promote_types(prefix.logits_V.dtype, torch.float32))
    scores_N = wide_V.log_softmax(-1)[ids_NL[:, 0]]
    scored_NL = torch.tensor([[place < len(ids) for place in range(longest + 1)] for ids in continuations])[:, 1:]
    rows = Rows(model, count=len(continuations), most=longest, prefix=prefix)
    for start in range(0, longest, CHUNK):
        if start:
            yield
        chunk = slice(start, min(start + CHUNK, longest))
        cache = layers(model, [rows], new=chunk.stop - start)
        nats_NL, _ = model(ids_NL[:, chunk], cache=cache, targets_BL=ids_NL[:, 1:][:, chunk])
        scores_N = scores_N - nats_NL.where(scored_NL[:, chunk].to(device), 0.0).sum(-1)
        rows.lengths = [chunk.stop] * len(continuations)
    return scores_N.tolist()


class TokenScore(NamedTuple):
    """A token's log probability, and the likeliest tokens in its place, likeliest first."""

    id: int
    log_probability: float
    likeliest: list[tuple[int, float]]


@torch.no_grad()
def token_scores_pieces(
    model: LaMDA, prefix: Prefix, ids: Sequence[int], *, likeliest: int
) -> Pieces[list[TokenScore]]:
    """The score of each token of a continuation, with so many `likeliest` others."""
    device, scores = prefix.logits_V.device, list[TokenScore]()
    rows, before_1V = Rows(model, count=1, most=len(ids), prefix=prefix), prefix.logits_V[None]
    for start in range(0, len(ids), CHUNK):
        if start:
            yield
        chunk = ids[start : start + CHUNK]
        after_LV = model(torch.tensor([chunk], device=device), cache=layers(model, [rows], new=len(chunk)))[0]
        rows.lengths[0] += len(chunk)
        logits_LV, before_1V = torch.cat([before_1V, after_LV[:-1]]), after_LV[-1:]
        logs_LV = logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)).log_softmax(-1)
        own_L = logs_LV.gather(-1, torch.tensor(chunk, device=device)[:, None])[:, 0].tolist()
        best = logs_LV.topk(likeliest)
        for id, own, *other in zip(chunk, own_L, best.indices.tolist(), best.values.tolist(), strict=True):
            scores.append(TokenScore(id, own, list(zip(*other, strict=True))))
    return scores


class TextStream:
    """Decodes ids one by one, up to the first stop string.

    The bytes of an incomplete character and what may begin a stop string are held back until they are certain.

    Attributes:
        text: all text returned so far; at the end without a stop, the text of `Tokenizer.decode`.
        stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stops, self._held = tokenizer, stops, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that one more id makes certain; may be empty, and is after a stop."""
        return self._release(self._decoder.decode(self._tokenizer.utf8(id)), is_last=False)

    def end(self) -> str:
        """The text held back, without an incomplete character."""
        return self._release("", is_last=True)

    def _release(self, more: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        self._held += more
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(places)
        certain = min(places, default=len(self._held) - (0 if is_last else self._doubtful()))
        released, self._held = self._held[:certain], self._held[certain:]
        self.text += released
        return released

    def _doubtful(self) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(self._held))
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if any(s.startswith(self._held[-size:]) for s in self._stops)), 0)
