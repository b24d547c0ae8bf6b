"""The optimisers: AdamW, DeepSpeed's Muon with AdamW beside it, and Adafactor; their groups, rates and states.

Every optimiser sees three parts of the model: the embedding with a rate of its own, the blocks'
matrices, and what does not decay (norm scales and relative-bias tables shift scores and scales, not features).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from lamda.config.schema import TrainConfig

MUON_MOMENTUM = 0.95
"""Muon's decay of its momentum, Nesterov's way (Jordan et al., kellerjordan.github.io/posts/muon)."""

ADAMW_RMS = 0.2
"""What Muon's updates are brought to: the usual RMS of AdamW's (Liu et al., arXiv 2502.16982, section 2.2)."""

State = dict[str, torch.Tensor]


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a model. The rate starts at 0: `set_learning_rate` gives each step its own."""
    embedding, matrices, others = (
        [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
        for part in ("embedding", "matrices", "others")
    )
    embedding_group = {
        "params": embedding,
        "weight_decay": train.weight_decay,
        "scale": 1.0 if train.optimizer == "adafactor" else train.embedding_lr_scale,
    }
    others_group = {"params": others, "weight_decay": 0.0, "scale": 1.0}
    if train.optimizer == "muon":
        return _muon([embedding_group, others_group], matrices, train)
    groups = [embedding_group, {"params": matrices, "weight_decay": train.weight_decay, "scale": 1.0}, others_group]
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, **_adamw_numbers(train))


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: embedding, matrices or others."""
    if name == "embedding.weight":
        return "embedding"
    return "matrices" if name.endswith(".weight") else "others"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate times its scale; the schedule is a function of the step and keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def fresh_state(like: torch.Tensor, *, optimizer: str, is_muon: bool) -> State:
    """The state of `like` before the first step, but for its counter.

    like: a parameter, or a flat stretch of several of one group. is_muon: whether Muon moves it (else AdamW, or
    Adafactor, whose factors are a row's and a column's mean squares and ask for the whole parameter).
    """
    if is_muon:
        return {"momentum_buffer": torch.zeros_like(like)}
    if optimizer != "adafactor":
        return {moment: torch.zeros_like(like) for moment in ("exp_avg", "exp_avg_sq")}
    if like.ndim < 2:
        return {"variance": torch.zeros_like(like)}
    return {"row_var": like.new_zeros(like.shape[0], 1), "col_var": like.new_zeros(1, like.shape[1])}


def eager_kernels(train: TrainConfig) -> AbstractContextManager[object]:
    """DeepSpeed marks Muon's kernels for compiling, a minute on a CPU for a few products of matrices: not here."""
    return torch.compiler.set_stance("force_eager") if train.optimizer == "muon" else nullcontext()


def _muon(adamw_groups: list[dict], matrices: list[torch.nn.Parameter], train: TrainConfig) -> MuonWithAuxAdam:
    """Muon for the matrices, in groups of one number of inputs, whose updates get the RMS of AdamW's.

    An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)); DeepSpeed multiplies it by sqrt(max(1, m/n)), which makes
    1 / sqrt(n) of it. So n inputs ask for a scale of ADAMW_RMS sqrt(n). Decay is in units of the plain rate.
    """
    of_width: dict[int, list[torch.nn.Parameter]] = {}
    for matrix in matrices:
        of_width.setdefault(matrix.shape[1], []).append(matrix)
    groups = [{**group, "use_muon": False, "lr": 0.0} for group in adamw_groups]
    for inputs, alike in of_width.items():
        scale = ADAMW_RMS * inputs**0.5
        groups.append(
            {
                "params": alike,
                "use_muon": True,
                "lr": 0.0,
                "momentum": MUON_MOMENTUM,
                "weight_decay": train.weight_decay / scale,
                "scale": scale,
            }
        )
    numbers = _adamw_numbers(train)
    for group in groups:
        if not group["use_muon"]:
            group.update({key: numbers[key] for key in ("betas", "eps")})
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"lr": 0.0, **numbers})


def _adamw_numbers(train: TrainConfig) -> dict[str, object]:
    return {"betas": (train.beta1, train.beta2), "eps": train.eps, "fused": True}
