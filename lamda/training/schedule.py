"""Learning rates, functions of the step alone."""

from __future__ import annotations

from math import cos, pi

from lamda.config.schema import TrainConfig


def learning_rate(step: int, *, train: TrainConfig, steps: int) -> float:
    """The rate of step `step` (the first is 1) of `steps`.

    cosine: linear warm-up, then half a cosine down to min_lr_ratio. wsd: warm-up, stable, then a
    linear fall over the last decay_fraction. inverse_sqrt: the peak for warmup_steps, then
    1/sqrt(step), as Google's own framework trains this shape (Lingvo, DenseLm128B8x8).
    """
    warmup, floor = train.warmup_steps, train.min_lr_ratio
    if train.schedule == "inverse_sqrt":
        return train.lr * (max(warmup, 1) / max(step, warmup, 1)) ** 0.5
    if step <= warmup:
        return train.lr * step / warmup
    if train.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return train.lr * (floor + (1 - floor) * 0.5 * (1 + cos(pi * min(1.0, done))))
    decay = train.decay_fraction * steps
    left = (steps - step) / decay if decay else 1.0
    return train.lr * (floor + (1 - floor) * min(1.0, left))
