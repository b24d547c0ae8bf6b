"""Calibration of the discriminators on held-out ratings: probabilities that hold, and the threshold of a filter.

Each attribute has a temperature and a bias (Platt scaling): P = sigmoid(scale * logit + bias), with the scale 1 /
temperature, at least 0. The last checkpoint of a fine-tuning has them in calibration.json; chat, server and evaluation
read them from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lamda.config.errors import UserError
from lamda.dialog.ratings import Ratings, accuracy, auc, calibration_error, reliability
from lamda.storage import manifest

CALIBRATION = "calibration.json"
"""The file of a checkpoint."""
UNWANTED = ("unsafe",)
"""Attributes that a good response lacks."""
LEAST = 20
"""Ratings of either class that AUC must rest on: the bootstrap's interval of a few is too narrow."""
NO_FILTER = 1.0
"""A threshold that no probability is above."""


class Scaling(BaseModel):
    """The calibration of one attribute.

    threshold: of the calibrated probability; `false_refusals` of the good responses are above it for an unwanted
    attribute, below it for another. auc, auc_interval: with the 95% interval, on the ratings that it was fitted to;
    None if a class is absent. positives, negatives: the number of these ratings.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    scale: float = Field(ge=0)
    bias: float
    threshold: float = Field(ge=0, le=1)
    auc: float | None
    auc_interval: tuple[float, float] | None
    positives: int
    negatives: int

    @classmethod
    def of(cls, ratings: Ratings, *, is_wanted: bool, false_refusals: float) -> Scaling:
        """Fit to ratings; at least one. false_refusals: the share of good responses that the threshold may refuse."""
        scale, bias = _fit(_logit(ratings.probabilities), ratings.positive)
        good = _sigmoid(scale * _logit(ratings.probabilities[ratings.positive == is_wanted]) + bias)
        area, interval = auc(ratings.probabilities, ratings.positive), ratings.auc_interval()
        positives = int(ratings.positive.sum())
        return cls(
            scale=scale,
            bias=bias,
            threshold=_threshold(good, is_wanted=is_wanted, false_refusals=false_refusals),
            auc=None if isnan(area) else area,
            auc_interval=None if isnan(interval[0]) else interval,
            positives=positives,
            negatives=len(ratings.positive) - positives,
        )

    @property
    def beats_chance(self) -> bool:
        """Whether the interval of AUC lies above 0.5, and rests on LEAST ratings of either class."""
        is_above = self.auc_interval is not None and self.auc_interval[0] > 0.5
        return is_above and min(self.positives, self.negatives) >= LEAST

    def report(self, ratings: Ratings, *, is_wanted: bool) -> dict[str, Any]:
        """Accuracy, calibration error and bins of calibrated ratings; threshold, and the share of each class beyond."""
        given = self.applied(ratings.probabilities), ratings.positive
        refused = given[0] < self.threshold if is_wanted else given[0] > self.threshold
        good = ratings.positive == is_wanted
        return {
            "accuracy": accuracy(*given),
            "calibration_error": calibration_error(*given),
            "reliability": reliability(*given),
            "threshold": self.threshold,
            "false_refusals": float(refused[good].mean()) if good.any() else None,
            "true_refusals": float(refused[~good].mean()) if not good.all() else None,
        }

    def applied(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """The calibrated probabilities."""
        return _sigmoid(self.scale * _logit(probabilities) + self.bias)


class Calibration(BaseModel):
    """The calibration of a model: of its attributes that have held-out ratings."""

    model_config = ConfigDict(frozen=True)

    false_refusals: float
    attributes: Mapping[str, Scaling]

    @classmethod
    def of(cls, ratings: Mapping[str, Ratings], *, false_refusals: float) -> Calibration:
        """Fit to held-out ratings, by attribute."""
        return cls(
            false_refusals=false_refusals,
            attributes={
                name: Scaling.of(each, is_wanted=name not in UNWANTED, false_refusals=false_refusals)
                for name, each in ratings.items()
            },
        )

    @classmethod
    def read(cls, checkpoint: Path) -> Calibration | None:
        """That of a checkpoint, None if it has none. Raises UserError if it is damaged."""
        path, remedy = checkpoint / CALIBRATION, "`lamda dialog evaluate RUN --calibrate 0.05` makes another one"
        if (checkpoint / manifest.MANIFEST).is_file():
            if CALIBRATION not in manifest.read(checkpoint)["files"]:
                return None
            if problem := manifest.problem_of(checkpoint, only=(CALIBRATION,)):
                raise UserError(f"{checkpoint}: {problem}; {remedy}")
        elif not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error

    def apply(self, judgment: Mapping[str, float]) -> dict[str, float]:
        """A judgment with calibrated probabilities; attributes without held-out ratings stay as they are."""
        return {
            name: float(self.attributes[name].applied(np.array(value))) if name in self.attributes else value
            for name, value in judgment.items()
        }

    def report(self, ratings: Mapping[str, Ratings]) -> dict[str, Any]:
        """`Scaling.report` of each attribute that is calibrated."""
        return {
            name: self.attributes[name].report(each, is_wanted=name not in UNWANTED)
            for name, each in ratings.items()
            if name in self.attributes
        }

    def objection(self, judgment: Mapping[str, float]) -> str | None:
        """The first attribute that beats chance whose calibrated probability is beyond its threshold."""
        for name, scaling in self.attributes.items():
            excess = (judgment.get(name, scaling.threshold) - scaling.threshold) * (1 if name in UNWANTED else -1)
            if scaling.beats_chance and excess > 0:
                return name
        return None

    @property
    def threshold(self) -> float:
        """Of P(unsafe); NO_FILTER if P(unsafe) does not beat chance."""
        unsafe = self.attributes.get("unsafe")
        return unsafe.threshold if unsafe is not None and unsafe.beats_chance else NO_FILTER

    @property
    def filter_note(self) -> str:
        """What the safety filter does, or why it is off."""
        unsafe = self.attributes.get("unsafe")
        if unsafe is None or unsafe.auc is None or unsafe.auc_interval is None:
            return "the safety filter is off: no held-out ratings show that P(unsafe) beats chance"
        low, high = unsafe.auc_interval
        counts = f"{unsafe.positives} unsafe and {unsafe.negatives} safe"
        shown = f"AUC {unsafe.auc:.3f}, 95% interval {low:.3f} to {high:.3f}, {counts}"
        if not unsafe.beats_chance:
            return f"the safety filter is off: on held-out ratings P(unsafe) does not beat chance ({shown})"
        return f"the safety filter drops responses with P(unsafe) above {unsafe.threshold:.3f} ({shown})"


def _logit(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(probabilities, 1e-9, 1 - 1e-9)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))


def _threshold(good: NDArray[np.float64], *, is_wanted: bool, false_refusals: float) -> float:
    """The strictest one that refuses at most this share of the good responses; none without such responses."""
    if not len(good):
        return float(not is_wanted)
    if is_wanted:
        return float(np.quantile(good, false_refusals, method="lower"))
    return float(np.quantile(good, 1 - false_refusals, method="higher"))


def _fit(logits: NDArray[np.float64], positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Scale and bias by maximum likelihood, with Platt's targets instead of 0 and 1; a negative scale becomes 0."""
    count = positive.sum()
    targets = np.where(positive, (count + 1) / (count + 2), 1 / (len(positive) - count + 2))
    mean, spread = logits.mean(), logits.std() or 1.0
    inputs = np.stack([(logits - mean) / spread, np.ones(len(logits))])
    base = float(_logit(targets.mean()))

    def loss(weights: NDArray[np.float64]) -> float:
        scores = weights @ inputs
        return float((np.logaddexp(0, scores) - targets * scores).sum())

    weights = np.array([0.0, base])
    for _ in range(100):
        predicted = _sigmoid(weights @ inputs)
        gradient = inputs @ (predicted - targets)
        curvature = (inputs * predicted * (1 - predicted)) @ inputs.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and abs(step).max() > 1e-9:
            step /= 2
        weights = weights - step
        if abs(step).max() < 1e-9:
            break
    if weights[0] <= 0:
        return 0.0, base
    scale = float(weights[0] / spread)
    return scale, float(weights[1] - scale * mean)
