"""How well probabilities tell two classes apart: area under the ROC curve, accuracy, calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 10
SAMPLES = 1000
"""Bootstrap samples of an interval."""


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The share of (positive, negative) pairs in which the positive one scores higher, ties counted half.

    By ranks (Mann and Whitney): [n] each. NaN where one of the classes is absent.
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(sizes) - (sizes - 1) / 2  # the mean of the ranks, from 1, of equal scores
    return float((rank[group][positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def auc_interval(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], clusters: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """A 95% interval of `auc` by the percentile bootstrap, whole clusters (conversations) drawn with replacement.

    Samples without both classes are left out; NaN where all are, and of a single cluster, which says nothing of others.
    """
    draw = np.random.default_rng(seed)
    _, cluster = np.unique(clusters, return_inverse=True)
    order = np.argsort(cluster, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(cluster))[:-1])
    if len(members) < 2:
        return float("nan"), float("nan")
    found = []
    for _ in range(SAMPLES):
        chosen = np.concatenate([members[place] for place in draw.integers(len(members), size=len(members))])
        found.append(auc(scores[chosen], positive[chosen]))
    kept = [value for value in found if not np.isnan(value)]
    low, high = np.percentile(kept, [2.5, 97.5]) if kept else (float("nan"), float("nan"))
    return float(low), float(high)


def accuracy(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The share of answers that are right where the likelier class is the answer."""
    return float(((probabilities > 0.5) == positive).mean())


def calibration_error(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Expected calibration error: |mean probability - share of positives| over BINS bins of equal width, by size."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return float(
        sum(
            abs(probabilities[place == number].sum() - positive[place == number].sum()) / len(positive)
            for number in range(BINS)
        )
    )
