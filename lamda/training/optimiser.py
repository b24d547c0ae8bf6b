"""AdamW over two groups: matrices decay, everything else does not."""

from __future__ import annotations

import torch

from lamda.config.schema import TrainConfig


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """The optimiser of a model. The rate starts at 0: `set_learning_rate` gives each step its own.

    Norm scales and relative-bias tables are not decayed: they shift scores and scales, not features.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or name.endswith("relative_bias") else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate; the schedule is a function of the step and keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = rate
