"""Learning rates and the length of a run, as functions of the step, or of the rows where the length is in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import cos, pi

from lamda.config.schema import Config, TrainConfig
from lamda.config.stages import Stage, stage_at
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


def final_step(stages: Sequence[Stage], state: RunState) -> int:
    """The number of the run's last step."""
    return total_steps(stages[0].config, state) if stages[0].schedule is None else stages[-1].last


def rate_in(stage: Stage, state: RunState) -> float:
    """The rate of the step after `state`, which is in `stage`."""
    if stage.schedule is None:
        return next_learning_rate(stage.config, state)
    first, last = stage.schedule
    return learning_rate(state.step + 1 - first, train=stage.config.train, steps=last - first)


def next_learning_rate(config: Config, state: RunState) -> float:
    """The rate of the step after `state` without stages; where the length is in tokens, progress is counted in rows."""
    train = config.train
    if train.tokens is None:
        return learning_rate(state.step + 1, train=train, steps=config.steps)
    batch = train.global_batch_size
    return learning_rate((state.samples + batch) / batch, train=train, steps=config.steps)


def remarks(stages: Sequence[Stage], state: RunState, *, before: Sequence[Stage] | None) -> Iterator[str]:
    """Warnings about rates to come: a peak that is never reached, a jump from `before`, the checkpoint's stages."""
    current = stage_at(stages, state.step)
    for stage in stages[current.number - 1 :]:
        first, last = stage.schedule or (0, stage.config.steps)
        if first == stage.first:
            yield from _never_reached(stage.config.train, last - first)
    if before is None:
        return
    previous = stage_at(before, state.step)
    now, then = rate_in(current, state), rate_in(previous, state)
    if abs(now - then) > NOTABLE_CHANGE * then:
        old, new = previous.config.train, current.config.train
        changed = [
            f"train.{key} was {getattr(old, key)}, is {getattr(new, key)}"
            for key in RATE_KEYS
            if getattr(old, key) != getattr(new, key)
        ]
        yield (
            f"step {state.step + 1}: the learning rate is {now:.2e}; by the settings of the checkpoint it would be "
            f"{then:.2e} ({'; '.join(changed) or 'data.sequence_length or the stages have changed'})"
        )


def _never_reached(train: TrainConfig, steps: int) -> Iterator[str]:
    warmed = learning_rate(max(1, min(train.warmup_steps, steps)), train=train, steps=steps)
    if train.warmup_steps and warmed < train.lr * (1 - NOTABLE_CHANGE):
        decay = f", the last {train.decay_fraction:.0%} of them to decay" if train.schedule == "wsd" else ""
        yield (
            f"the learning rate never reaches train.lr {train.lr:.2e}: train.warmup_steps is {train.warmup_steps}, and "
            f"its schedule has {steps} steps{decay}"
        )
