"""Continuing prompts, and judging continuations, with cached keys and values.

    prefix = prefill(model, ids)                        # computed once
    candidates = sample(model, prefix, count=16)        # all share the prefix
    candidates.next_logits([symbol])                    # after each candidate and a symbol

Several groups of candidates go through the model together (`advance`); they may come and go between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from lamda.config.errors import UserError
from lamda.inference.cache import CHUNK, Prefix, Rows, feed, layers
from lamda.inference.sampling import Sampler, Sampling
from lamda.model import LaMDA

Result = TypeVar("Result")

_JUDGED = 4
"""Tokens after a candidate that there is room for without copying its keys and values."""

OnToken = Callable[[int, int], bool | None]
"""Is told each new id as it comes: (number of the candidate, id); True ends the candidate with it."""


class Candidates:
    """Continuations of one prefix, being sampled or finished.

    Attributes:
        ids: the tokens of each, without what stopped it.
        log_probabilities: under the model itself, the sum over ids and stop.
        stopped: whether each ended with one of `stop_ids` or by `on_token`, and not for its length.
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
        self.rows = Rows(model, count=count, most=sampling.max_new_tokens + _JUDGED, prefix=prefix)
        self._model, self._sampling, self._on_token, self._steps = model, sampling, on_token, 0
        self._sampler = Sampler(sampling, prompt=prefix.ids, count=count, logits=prefix.logits_V)
        self.take(prefix.logits_V.expand(count, -1))

    @property
    def finished(self) -> bool:
        """Whether none goes on."""
        return self._steps == self._sampling.max_new_tokens or all(self.stopped)

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [count, V] of the token after each candidate, without its stop, and these ids; changes nothing."""
        if not ids and not all(self._missing()):
            raise ValueError("nothing follows the candidates: give at least one id")
        return feed(self._model, [self.rows], [[*missing, *ids] for missing in self._missing()])

    def _missing(self) -> list[list[int]]:
        """The ids of each candidate that the model was not given yet: at most the last."""
        return [ids[length:] for ids, length in zip(self.ids, self.rows.lengths, strict=True)]

    def take(self, logits_NV: Tensor) -> None:
        """Choose a token for each candidate that goes on, from what `forward` gives. Raises NotFiniteError."""
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
    """The logits [count, V] of each group's next tokens; the groups, none of them finished, share each product.

    Each group is to `take` its own. Until it did, nothing has changed, and the same can be asked again.
    """
    tokens = [missing or [0] for group in groups for missing in group._missing()]
    logits_NV = feed(model, [group.rows for group in groups], tokens)
    return logits_NV.split([len(group.rows) for group in groups])


def advance(model: LaMDA, groups: Sequence[Candidates]) -> None:
    """A token more for every candidate that goes on; the groups, none of them finished, share each product."""
    for group, own_NV in zip(groups, forward(model, groups), strict=True):
        group.take(own_NV)


Pieces = Generator[None, None, Result]
"""Work on the model in pieces of at most CHUNK tokens a row: whoever runs it may do other things, or stop, between."""


class Run(Protocol):
    """How pieces are run; a server runs those of several requests in turn."""

    def __call__(self, pieces: Pieces[Result], *, tokens: int = 0) -> Result:
        """What the pieces give. tokens: how many they compute, about, by which the work of several is ordered."""
        ...


def whole(pieces: Pieces[Result], *, tokens: int = 0) -> Result:
    """Run all pieces, one after another."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return cast(Result, end.value)


def prefill(model: LaMDA, ids: Sequence[int]) -> Prefix:
    """Compute a prompt. Raises UserError where it is empty."""
    return whole(prefill_pieces(model, ids))


@torch.no_grad()
def prefill_pieces(model: LaMDA, ids: Sequence[int]) -> Pieces[Prefix]:
    """The same in pieces."""
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    rows = Rows(model, count=1, most=len(ids))
    for start in range(0, len(ids), CHUNK):
        if start:
            yield
        chunk = ids[start : start + CHUNK]
        logits_NV = feed(model, [rows], [chunk])
        rows.lengths[0] += len(chunk)
    return rows.as_prefix(ids, logits_NV[0])


@torch.no_grad()
def sample(
    model: LaMDA, prefix: Prefix, *, count: int = 1, sampling: Sampling, on_token: OnToken | None = None
) -> Candidates:
    """`count` independent continuations of a prefix.

    Candidate c is a function of the prefix, the sampling and c alone: the first four of 16 are those of four.
    Raises UserError where count is less than 1.
    """
    candidates = Candidates(model, prefix, count=count, sampling=sampling, on_token=on_token)
    while not candidates.finished:
        advance(model, [candidates])
    return candidates


@torch.no_grad()
def generate(model: LaMDA, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continue prompts of any lengths together: the new ids of each, the same as it has alone.

    Raises UserError where a prompt is empty.
    """
    groups = [Candidates(model, prefill(model, ids), count=1, sampling=sampling) for ids in prompts]
    while running := [group for group in groups if not group.finished]:
        advance(model, running)
    return [group.ids[0] for group in groups]


def score(model: LaMDA, prefix: Prefix, continuations: Sequence[Sequence[int]]) -> list[float]:
    """The log probability of each continuation after the prefix. Raises ValueError where one is empty."""
    return whole(score_pieces(model, prefix, continuations))


@torch.no_grad()
def score_pieces(model: LaMDA, prefix: Prefix, continuations: Sequence[Sequence[int]]) -> Pieces[list[float]]:
    """The same in pieces."""
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
