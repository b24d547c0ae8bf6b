"""Loss sums over all targets, for tests that take a step without an engine."""

from __future__ import annotations

from torch import Tensor

from lamda.model.loss import token_losses


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the targets: (nats, logsumexp²), scalars. weights_BL: factor of each target, 0 where it has no loss."""
    nll_BL, log_z_BL = token_losses(logits_BLV, targets_BL)
    squares_BL = log_z_BL.square()
    if weights_BL is not None:
        nll_BL, squares_BL = nll_BL * weights_BL, squares_BL * weights_BL
    return nll_BL.sum(), squares_BL.sum()
