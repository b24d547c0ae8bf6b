"""Continuations of several prompts, and scores of given ones, in one call each."""

from __future__ import annotations

from collections.abc import Sequence

from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, finish, prefill, score_pieces, whole
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA


def generate(model: LaMDA, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continue prompts of any lengths in one batch: the new ids of each, the same as alone."""
    groups = [Candidates(model, prefill(model, ids), count=1, sampling=sampling) for ids in prompts]
    finish(model, groups)
    return [group.ids[0] for group in groups]


def score(model: LaMDA, prefix: Prefix, continuations: Sequence[Sequence[int]]) -> list[float]:
    """The log probability of each continuation after the prefix."""
    return whole(score_pieces(model, prefix, continuations))
