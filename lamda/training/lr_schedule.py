"""Learning rates and the length of a run, as functions of the step, or of the rows where the length is in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi

from lamda.config.schema import Config, TrainConfig
from lamda.storage.state import RunState

NOTABLE_CHANGE = 0.01  # relative change of the rate from the previous settings that is worth a warning

RATE_KEYS = (
    "steps", "tokens", "global_batch_size", "lr", "schedule", "warmup_steps", "decay_fraction", "min_lr_ratio"
)  # fmt: skip
"""Keys of `train` that determine the rate."""


def learning_rate(step: float, *, train: TrainConfig, steps: int) -> float:
    """The rate of step `step` (the first is 1) of `steps`.

    cosine: linear warm-up, then half a cosine down to min_lr_ratio. wsd: warm-up, stable, then a
    linear fall over the last decay_fraction; a warm-up that reaches into the fall ends where it meets it.
    inverse_sqrt: the peak for warmup_steps, then 1/sqrt(step), as Google's own framework trains this shape
    (Lingvo, DenseLm128B8x8).
    """
    warmup, floor = train.warmup_steps, train.min_lr_ratio
    if train.schedule == "inverse_sqrt":
        return train.lr * (max(warmup, 1) / max(step, warmup, 1)) ** 0.5
    warm = step / warmup if step <= warmup else 1.0
    if train.schedule == "cosine":
        if step <= warmup:
            return train.lr * warm
        done = (step - warmup) / max(1, steps - warmup)
        return train.lr * (floor + (1 - floor) * 0.5 * (1 + cos(pi * min(1.0, done))))
    decay = train.decay_fraction * steps
    left = max(0.0, (steps - step) / decay) if decay else 1.0
    return train.lr * min(warm, floor + (1 - floor) * min(1.0, left))


def total_steps(config: Config, state: RunState) -> int:
    """The number of the run's last step. With `train.tokens` it depends on `state` if the batch size has changed.

    A row counts as `data.sequence_length` tokens, however many of its targets have a loss.
    """
    train, length = config.train, config.data.sequence_length
    if train.tokens is None:
        return config.steps
    left = train.tokens - state.samples * length
    return state.step + max(0, -(-left // (train.global_batch_size * length)))


def next_learning_rate(config: Config, state: RunState) -> float:
    """The rate of the step after `state`; where the length is in tokens, progress is counted in rows."""
    train = config.train
    if train.tokens is None:
        return learning_rate(state.step + 1, train=train, steps=config.steps)
    batch = train.global_batch_size
    return learning_rate((state.samples + batch) / batch, train=train, steps=config.steps)


def remarks(config: Config, state: RunState, *, before: Config | None) -> Iterator[str]:
    """Warnings about rates to come: a peak that is never reached, a jump from `before`, the checkpoint's settings."""
    train, steps = config.train, config.steps
    warmed = learning_rate(max(1, min(train.warmup_steps, steps)), train=train, steps=steps)
    if train.warmup_steps and warmed < train.lr * (1 - NOTABLE_CHANGE):
        decay = f", the last {train.decay_fraction:.0%} of them to decay" if train.schedule == "wsd" else ""
        yield (
            f"the learning rate never reaches train.lr {train.lr:.2e}: train.warmup_steps is {train.warmup_steps}, and "
            f"the run has {steps} steps{decay}"
        )
    if before is None:
        return
    now, then = next_learning_rate(config, state), next_learning_rate(before, state)
    if abs(now - then) > NOTABLE_CHANGE * then:
        changed = [
            f"train.{key} was {getattr(before.train, key)}, is {getattr(train, key)}"
            for key in RATE_KEYS
            if getattr(before.train, key) != getattr(train, key)
        ]
        yield (
            f"step {state.step + 1}: the learning rate is {now:.2e}; by the settings of the checkpoint it would be "
            f"{then:.2e} ({'; '.join(changed) or 'data.sequence_length has changed'})"
        )
