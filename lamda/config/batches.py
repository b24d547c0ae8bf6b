"""Batch arithmetic: how the rows of a step are divided into ranks and micro-batches."""

from __future__ import annotations

from lamda.config.errors import UserError
from lamda.config.schema import TrainConfig


def micro_batches_per_rank(train: TrainConfig, *, world_size: int) -> int:
    """The accumulation steps. Raises UserError with the nearest settings that work if the batch is not divisible."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    count, left = divmod(batch // micro, world_size)
    if left == 0:
        return count
    raise UserError(
        f"{world_size} ranks cannot share {batch // micro} micro-batches evenly (train.global_batch_size {batch} / "
        f"train.micro_batch_size {micro}); what would work: {'; '.join(_ways(batch, micro, world_size))}"
    )


def _ways(batch: int, micro: int, world_size: int) -> list[str]:
    """The ways to fix it by one setting, or by two where there are more ranks than rows."""
    ranks = _nearest(world_size, _divisors(batch // micro))
    unit = micro * world_size
    multiples = [times * unit for times in (batch // unit, batch // unit + 1) if times]
    ways = [f"{ranks} rank{'s' * (ranks != '1')}", f"train.global_batch_size {_nearest(batch, multiples)}"]
    if batch % world_size == 0:
        ways.append(f"train.micro_batch_size {_nearest(micro, _divisors(batch // world_size))}")
    elif world_size > batch and micro > 1:
        ways.append(f"train.micro_batch_size 1 with {batch} ranks or with train.global_batch_size {world_size}")
    return ways


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _nearest(wanted: int, choices: list[int]) -> str:
    """The nearest choices below and above: `4 or 6`, or `4`."""
    below, above = [n for n in choices if n < wanted][-1:], [n for n in choices if n > wanted][:1]
    return " or ".join(map(str, below + above))
