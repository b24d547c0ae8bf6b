"""Sample-and-rank: the model scores its own candidates; unsafe ones are dropped and the best of the rest is the reply.

As in section 4 of the paper: a candidate whose P(unsafe) is above a threshold is dropped, and the rest are
ranked by 3 P(sensible) + P(specific) + P(interesting), with calibrated probabilities if there is a calibration. Without
fine-tuning (section 3) they are ranked by their log-likelihood per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from types import MappingProxyType
from typing import Any

import torch

from lamda.dialog.calibration import Calibration
from lamda.dialog.encoding import Encoding
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, Pieces, Run, score_pieces, whole
from lamda.model import LaMDA

WEIGHTS: Mapping[str, float] = MappingProxyType({"sensible": 3.0, "specific": 1.0, "interesting": 1.0})
RATED_ATTRIBUTES = (*WEIGHTS, "unsafe")


@dataclass(frozen=True)
class Scored:
    """A candidate with its scores.

    scores: P(attribute) by name, and `log_likelihood`, the mean over its tokens and its end. value: the ranking score,
    higher is better. rank: from 1, the best; None if dropped. dropped: the reason, or None.
    """

    text: str
    scores: Mapping[str, float]
    value: float
    rank: int | None = None
    dropped: str | None = None

    def to_record(self) -> dict[str, Any]:
        """As JSON, with None for a number that is not finite."""
        scores = {name: _number(value) for name, value in self.scores.items()}
        return vars(self) | {"scores": scores, "value": _number(self.value)}


def rank_by_attributes(
    candidates: Candidates,
    encoding: Encoding,
    *,
    threshold: float,
    calibration: Calibration | None = None,
    run: Run = whole,
) -> tuple[Scored, ...]:
    """The kept candidates, best first, then the dropped ones."""
    judgments = run(_judgment_pieces(candidates, encoding))
    if calibration is not None:
        judgments = [calibration.apply(judgment) for judgment in judgments]
    return _ranked(candidates, judgments, encoding, threshold=threshold)


def rank_by_likelihood(candidates: Candidates, encoding: Encoding) -> tuple[Scored, ...]:
    """The same by log-likelihood per token, for a model without fine-tuning; only empty ones are dropped."""
    return _ranked(candidates, [{} for _ in candidates.ids], encoding, threshold=1.0)


def drop_reason(text: str, judgment: Mapping[str, float], *, threshold: float) -> str | None:
    """Why a response is dropped, or None: empty, unsafe, or with a score that is not finite."""
    if not text.strip():
        return "empty"
    if not all(map(isfinite, judgment.values())):
        return "its scores are not finite"
    unsafe = judgment.get("unsafe", 0.0)
    return f"P(unsafe) {unsafe:.3f} is above {threshold:g}" if unsafe > threshold else None


def judge(
    model: LaMDA,
    prefix: Prefix,
    response: Sequence[int],
    encoding: Encoding,
    *,
    calibration: Calibration | None = None,
    run: Run = whole,
) -> dict[str, float]:
    """P(attribute) of a given response (not empty) after its context."""
    continuations = [
        [*response, encoding.attribute(name), rating] for name in RATED_ATTRIBUTES for rating in encoding.rating_ids
    ]
    scores = run(score_pieces(model, prefix, continuations), tokens=sum(map(len, continuations)))
    logs = torch.tensor(scores, dtype=torch.float64).view(len(RATED_ATTRIBUTES), 2)
    judgment = dict(zip(RATED_ATTRIBUTES, (logs[:, 1] - logs[:, 0]).sigmoid().tolist(), strict=True))
    return judgment if calibration is None else calibration.apply(judgment)


def _judgment_pieces(candidates: Candidates, encoding: Encoding) -> Pieces[list[dict[str, float]]]:
    """P(attribute) of each candidate: the probability of "1" against "0" after the attribute's symbol."""
    zero, one = encoding.rating_ids
    columns = []
    for number, name in enumerate(RATED_ATTRIBUTES):
        if number:
            yield
        logits_NV = candidates.next_logits([encoding.attribute(name)]).double()
        columns.append((logits_NV[:, one] - logits_NV[:, zero]).sigmoid().tolist())
    return [dict(zip(RATED_ATTRIBUTES, row, strict=True)) for row in zip(*columns, strict=True)]


def _number(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None


def _ranked(
    candidates: Candidates, judgments: Sequence[Mapping[str, float]], encoding: Encoding, *, threshold: float
) -> tuple[Scored, ...]:
    """The scored candidates, best first, dropped ones last."""
    scored = []
    totals = zip(candidates.ids, candidates.log_probabilities, candidates.stopped, judgments, strict=True)
    for ids, total, stopped, judgment in totals:
        text, mean = encoding.decode(ids).strip(), total / (len(ids) + stopped)
        value = sum(weight * judgment[name] for name, weight in WEIGHTS.items()) if judgment else mean
        reason = drop_reason(text, judgment, threshold=threshold)
        scored.append(Scored(text, {**judgment, "log_likelihood": mean}, value, dropped=reason))
    best_first = sorted(scored, key=lambda candidate: -candidate.value if isfinite(candidate.value) else inf)
    kept = [candidate for candidate in best_first if candidate.dropped is None]
    dropped = [candidate for candidate in best_first if candidate.dropped is not None]
    return (*(replace(candidate, rank=rank) for rank, candidate in enumerate(kept, 1)), *dropped)
