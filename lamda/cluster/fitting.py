"""Which settings fit into a GPU's memory: the largest micro-batch, and the fewest changes that make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lamda.cluster.activations import RECOMPUTE
from lamda.cluster.memory import Setting, peak

MOST = 5
"""Settings that are named."""


def largest_rows(setting: Setting, *, batch: int, limit: int) -> int | None:
    """The largest micro-batch that divides the ranks' part of `batch` rows and fits; None where none does."""
    return next((each.rows for each in _micro_batches(setting, batch=batch) if peak(each) <= limit), None)


def nearest_that_fit(setting: Setting, *, batch: int, limit: int) -> list[str]:
    """The settings that fit with the fewest changes, told as changes; empty where none does."""
    told: dict[str, int] = {}
    for found in _candidates(setting, batch=batch, limit=limit):
        changes = _changes(setting, found)
        told.setdefault(", ".join(changes), len(changes))
    fewest = min(told.values(), default=0)
    return [text for text, count in told.items() if count == fewest][:MOST]


def _candidates(setting: Setting, *, batch: int, limit: int) -> Iterator[Setting]:
    """Settings that fit, mild changes before strong ones."""
    stages = [setting.sharding.stage, *range(setting.sharding.stage + 1, 4)]
    attentions = ("math", "sdpa") if setting.model.attention == "math" else (setting.model.attention,)
    for stage in stages:
        for attention in attentions:
            for recompute in RECOMPUTE[RECOMPUTE.index(setting.recompute) :]:
                changed = replace(
                    setting,
                    sharding=setting.sharding.at_stage(stage),
                    model=setting.model.model_copy(update={"attention": attention}),
                    recompute=recompute,
                )
                yield from _smaller_or_wider(changed, batch=batch, limit=limit)


def _smaller_or_wider(setting: Setting, *, batch: int, limit: int) -> Iterator[Setting]:
    """As it is; with fewer rows; on more GPUs; and both: the first of each that fits."""
    rows, ranks = setting.rows, setting.sharding.ranks
    wider = [replace(setting.sharding, ranks=more) for more in range(ranks + 1, batch + 1) if batch % more == 0]
    alike = [each for each in _micro_batches(setting, batch=batch) if each.rows <= rows]
    elsewhere = [each for more in wider for each in _micro_batches(replace(setting, sharding=more), batch=batch)]
    ways = (
        [each for each in alike if each.rows == rows],
        alike,
        [each for each in elsewhere if each.rows == rows],
        [each for each in elsewhere if each.rows <= rows],
    )
    for way in ways:
        yield from [each for each in way if peak(each) <= limit][:1]


def _micro_batches(setting: Setting, *, batch: int) -> list[Setting]:
    """The setting with every number of rows that the ranks can share the batch in, the largest first."""
    own, left = divmod(batch, setting.sharding.ranks)
    if left:
        return []
    return [replace(setting, rows=rows, accumulation=own // rows) for rows in range(own, 0, -1) if own % rows == 0]


def _changes(before: Setting, after: Setting) -> list[str]:
    pairs = {
        "train.micro_batch_size {}": (before.rows, after.rows),
        "train.recompute {}": (before.recompute, after.recompute),
        "model.attention {}": (before.model.attention, after.model.attention),
        "ZeRO stage {}": (before.sharding.stage, after.sharding.stage),
        "{} GPUs": (before.sharding.ranks, after.sharding.ranks),
    }
    return [name.format(new) for name, (old, new) in pairs.items() if old != new]
