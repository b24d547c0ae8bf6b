"""How well predicted ratings agree with given ones: AUC with its interval, accuracy, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 10
"""Bins of the expected calibration error and of a reliability diagram."""
SAMPLES = 1000
"""Bootstrap samples of a confidence interval."""


class Bin(NamedTuple):
    """A bin of a reliability diagram: number of ratings, their mean P(1), and the fraction that are 1."""

    ratings: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Ratings:
    """Per rating of one attribute: the model's P(1), the label, and the index of the conversation. [n] each."""

    probabilities: NDArray[np.float64]
    positive: NDArray[np.bool_]
    conversations: NDArray[np.int64]

    def metrics(self) -> dict[str, float]:
        """AUC, accuracy and expected calibration error."""
        measures = {"auc": auc, "accuracy": accuracy, "calibration_error": calibration_error}
        return {name: measure(self.probabilities, self.positive) for name, measure in measures.items()}

    def auc_interval(self) -> tuple[float, float]:
        """The 95% interval of AUC."""
        return auc_interval(self.probabilities, self.positive, self.conversations)

    def report(self) -> dict[str, Any]:
        """`metrics`, the 95% interval of AUC, the fraction of the majority class, both classes' sizes, and the bins."""
        positives = int(self.positive.sum())
        majority = max(positives, len(self.positive) - positives) / len(self.positive)
        counts = {"commoner_class": majority, "positives": positives, "negatives": len(self.positive) - positives}
        bins = reliability(self.probabilities, self.positive)
        return {**self.metrics(), "auc_interval": self.auc_interval(), **counts, "reliability": bins}


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve (Mann-Whitney U): ties count half. [n] each; NaN if a class is absent."""
    return _auc(np.unique(scores, return_inverse=True)[1], positive, np.ones(len(scores)))


def _auc(ranks: NDArray[np.int64], positive: NDArray[np.bool_], weights: NDArray[Any]) -> float:
    """The same with a weight for each score. ranks: from 0, equal ones for equal scores."""
    ones, zeros = (np.bincount(ranks, weights=weights * of_class) for of_class in (positive, ~positive))
    pairs = ones.sum() * zeros.sum()
    return float(ones @ (np.cumsum(zeros) - zeros / 2) / pairs) if pairs else float("nan")


def auc_interval(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], clusters: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """A 95% interval of `auc` by the percentile bootstrap over clusters (conversations).

    Samples without both classes are dropped; NaN if no sample remains or there is only one cluster.
    """
    draw = np.random.default_rng(seed)
    ranks, cluster = (np.unique(values, return_inverse=True)[1] for values in (scores, clusters))
    count = int(cluster.max()) + 1
    if count < 2:
        return float("nan"), float("nan")
    drawn = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(SAMPLES))
    found = [_auc(ranks, positive, times[cluster]) for times in drawn]
    kept = [value for value in found if not np.isnan(value)]
    low, high = np.percentile(kept, [2.5, 97.5]) if kept else (float("nan"), float("nan"))
    return float(low), float(high)


def accuracy(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The fraction of labels that the likelier class predicts."""
    return float(((probabilities > 0.5) == positive).mean())


def calibration_error(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Expected calibration error: |mean probability - fraction of positives| over BINS equal bins, weighted by size."""
    found = reliability(probabilities, positive)
    return sum(each.ratings * abs(each.predicted - each.observed) for each in found if each.ratings) / len(positive)


def reliability(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> list[Bin]:
    """The reliability diagram: BINS bins of equal width; 0 for the means of an empty one, and NaN stays NaN."""
    place = np.minimum((np.nan_to_num(probabilities) * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    sums = (np.bincount(place, weights=values, minlength=BINS) for values in (probabilities, positive))
    predicted, observed = (values / np.maximum(counts, 1) for values in sums)
    return [Bin(*each) for each in zip(counts.tolist(), predicted.tolist(), observed.tolist(), strict=True)]
