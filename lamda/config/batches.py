"""Batch arithmetic: how the rows of a step fall on ranks and micro-batches."""

from lamda.config.errors import UserError
from lamda.config.schema import TrainConfig


def micro_batches_per_rank(train: TrainConfig, *, world: int) -> int:
    """Micro-batches that each of `world` ranks computes in a step: the gradient accumulation.

    Raises UserError, naming the nearest numbers of ranks, where they do not come out even.
    """
    count = train.global_batch_size // train.micro_batch_size
    if count % world == 0:
        return count // world
    fitting = sorted((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - world))[:2]
    raise UserError(
        f"{world} ranks cannot share {count} micro-batches evenly (train.global_batch_size {train.global_batch_size} / "
        f"train.micro_batch_size {train.micro_batch_size}); the nearest numbers of ranks that can: "
        f"{' and '.join(map(str, sorted(fitting)))}"
    )
