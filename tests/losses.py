"""Loss sums over all targets, for tests that take a step without an engine."""

from __future__ import annotations

from torch import Tensor

from lamda.model.loss import token_losses


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the targets: (nats, logsumexp²), scalars. weights_BL: factor of each target, 0 where it has no loss."""
    nats_BL, partition_BL = token_losses(logits_BLV, targets_BL)
    squares_BL = partition_BL.square()
    if weights_BL is not None:
        nats_BL, squares_BL = nats_BL * weights_BL, squares_BL * weights_BL
    return nats_BL.sum(), squares_BL.sum()
