"""The optimizers: AdamW, DeepSpeed's Muon combined with AdamW, and Adafactor; their parameter groups and states.

Each parameter group has its own learning rate (`lamda.engines.param_groups`). Only the blocks' matrices decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

import torch

from lamda.config.schema import OptimizerName, TrainConfig
from lamda.engines.param_groups import ADAFACTOR_EPS, ADAMW_RMS, MUON_MOMENTUM, lr_multipliers, weight_decays
from lamda.model import LaMDA
from lamda.model.weights import MATRIX_GROUPS, ParamGroup, param_group_of

if TYPE_CHECKING:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

State = dict[str, torch.Tensor]
Group = dict[str, Any]  # one of `torch.optim.Optimizer.param_groups`


def make_optimizer(model: LaMDA, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a model. The learning rate starts at 0: `set_learning_rate` sets it for each step."""
    multipliers = lr_multipliers(train, model.config)
    decays = weight_decays(train, multipliers)
    groups: dict[ParamGroup, Group] = {
        name: {"params": [], "weight_decay": decays[name], "lr_multiplier": multiplier}
        for name, multiplier in multipliers.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[param_group_of(name)]["params"].append(parameter)
    groups = {name: group for name, group in groups.items() if group["params"]}
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups.values(), lr=0.0, **_adamw_kwargs(train))
        case "muon":
            matrices = [groups.pop(name) for name in MATRIX_GROUPS if name in groups]
            return make_muon(matrices, list(groups.values()), train)
        case "adafactor":
            return torch.optim.Adafactor(groups.values(), lr=0.0, eps=ADAFACTOR_EPS)
        case _:
            assert_never(train.optimizer)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group for the next step; the schedule (`train.schedule`) keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def check_the_norm_alone(optimizer: Any) -> None:
    """Let DeepSpeed's bf16 optimizer of stage 0 skip a step by the gradient's norm alone.

    It first reads back for each gradient whether it is finite, and waits for the device each time. The norm, which it
    reads next, is not finite then either, and the step is skipped all the same.
    """
    if hasattr(optimizer, "overflow_checker"):
        optimizer.overflow_checker.check = lambda: False


def fresh_state(like: torch.Tensor, *, optimizer: OptimizerName, is_muon: bool) -> State:
    """The state of `like` before the first step, without the step counter.

    Checkpoints do not hold the counter: `fragments.reset_state` restores it from `RunState.updates`.
    like: a parameter, or a flat span of several of one group. is_muon: whether Muon itself updates it, rather than the
    AdamW that `muon` uses for other groups. Adafactor's state is the mean squares of rows and columns, so `like` must
    be the whole parameter there.
    """
    if is_muon:
        return {"momentum_buffer": torch.zeros_like(like)}
    match optimizer:
        case "adamw" | "muon":
            return {moment: torch.zeros_like(like) for moment in ("exp_avg", "exp_avg_sq")}
        case "adafactor":
            if like.ndim < 2:
                return {"variance": torch.zeros_like(like)}
            return {"row_var": like.new_zeros(like.shape[0], 1), "col_var": like.new_zeros(1, like.shape[1])}
        case _:
            assert_never(optimizer)


def without_compile(train: TrainConfig) -> AbstractContextManager[object]:
    """Disables `torch.compile` of DeepSpeed's Muon kernels: it takes a minute on a CPU for a few matrix products."""
    return torch.compiler.set_stance("force_eager") if train.optimizer == "muon" else nullcontext()


def make_muon(matrices: Iterable[Group], others: Iterable[Group], train: TrainConfig) -> MuonWithAuxAdam:
    """Muon for groups of matrices, AdamW for other groups; each has `params`, `lr_multiplier`, `weight_decay`."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # plain loops need no DeepSpeed

    kwargs = _adamw_kwargs(train)
    adamw = {key: kwargs[key] for key in ("betas", "eps")}
    groups = [split for group in matrices for split in _split_by_fan_in(group)]
    groups += [{**group, **adamw, "use_muon": False, "lr": 0.0} for group in others]
    optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"lr": 0.0, **kwargs})
    optimizer.step = partial(_step_with_gradients, optimizer, optimizer.step)
    return optimizer


def _step_with_gradients(optimizer: MuonWithAuxAdam, step: Callable[..., object], *args: object) -> None:
    """Skip a step without gradients: DeepSpeed's Muon treats them as zeros, so momentum and decay change the weights.

    Not a subclass, because DeepSpeed checks for the exact classes that it has tested with ZeRO.
    """
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        step(*args)


def _split_by_fan_in(group: Group) -> Iterator[Group]:
    """Split a group of matrices by fan-in, and give each group's updates the RMS of AdamW's.

    An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)). DeepSpeed multiplies it by sqrt(max(1, m/n)), which gives
    1 / sqrt(n) for a fan-in of n, so the multiplier is ADAMW_RMS sqrt(n). It does not change learning rate times decay.
    """
    by_fan_in: dict[int, list[torch.nn.Parameter]] = {}
    for matrix in group["params"]:
        by_fan_in.setdefault(matrix.shape[1], []).append(matrix)
    for fan_in, matrices in by_fan_in.items():
        to_adamw_rms = ADAMW_RMS * fan_in**0.5
        yield {
            "params": matrices,
            "use_muon": True,
            "lr": 0.0,
            "momentum": MUON_MOMENTUM,
            "weight_decay": group["weight_decay"] / to_adamw_rms,
            "lr_multiplier": group["lr_multiplier"] * to_adamw_rms,
        }


def _adamw_kwargs(train: TrainConfig) -> dict[str, Any]:
    return {"betas": (train.beta1, train.beta2), "eps": train.eps, "fused": True}
