"""AdamW over three groups: the embedding with a rate of its own, the other matrices, and what does not decay."""

from __future__ import annotations

import torch

from lamda.config.schema import TrainConfig


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """The optimiser of a model. The rate starts at 0: `set_learning_rate` gives each step its own.

    Norm scales and relative-bias tables are not decayed: they shift scores and scales, not features.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"embedding": [], "matrices": [], "others": []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("relative_bias")
        groups["embedding" if name == "embedding.weight" else "matrices" if is_matrix else "others"].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups["embedding"], "weight_decay": train.weight_decay, "scale": train.embedding_lr_scale},
            {"params": groups["matrices"], "weight_decay": train.weight_decay, "scale": 1.0},
            {"params": groups["others"], "weight_decay": 0.0, "scale": 1.0},
        ],
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate times its scale; the schedule is a function of the step and keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
