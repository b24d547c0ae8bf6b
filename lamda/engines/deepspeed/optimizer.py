"""The optimizers: AdamW, DeepSpeed's Muon combined with AdamW, and Adafactor; their parameter groups and states.

Each part of the model has a learning rate of its own (`lamda.engines.param_groups`). Only the blocks' matrices decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from lamda.config.schema import TrainConfig
from lamda.engines.param_groups import ADAFACTOR_EPS, ADAMW_RMS, MUON_MOMENTUM, rate_scales, weight_decays
from lamda.model import LaMDA
from lamda.model.weights import ParamGroup, part_of

State = dict[str, torch.Tensor]
Group = dict[str, Any]  # one of `torch.optim.Optimizer.param_groups`


def make_optimizer(model: LaMDA, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a model. The learning rate starts at 0: `set_learning_rate` sets it for each step."""
    scales = rate_scales(train, model.config)
    decays = weight_decays(train, scales)
    groups: dict[ParamGroup, Group] = {
        part: {"params": [], "weight_decay": decays[part], "scale": scale} for part, scale in scales.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name)]["params"].append(parameter)
    groups = {part: group for part, group in groups.items() if group["params"]}
    if train.optimizer == "muon":
        matrices = [groups.pop(part) for part in ("query", "matrices") if part in groups]
        return make_muon(matrices, list(groups.values()), train)
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups.values(), lr=0.0, eps=ADAFACTOR_EPS)
    return torch.optim.AdamW(groups.values(), lr=0.0, **_adamw_numbers(train))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate times its scale; the schedule is a function of the step and keeps no state."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def fresh_state(like: torch.Tensor, *, optimizer: str, is_muon: bool) -> State:
    """The state of `like` before the first step, without the step counter.

    like: a parameter, or a flat span of several of one group. is_muon: whether Muon moves it (else AdamW, or
    Adafactor, whose factors are mean squares of rows and columns and need the whole parameter).
    """
    if is_muon:
        return {"momentum_buffer": torch.zeros_like(like)}
    if optimizer != "adafactor":
        return {moment: torch.zeros_like(like) for moment in ("exp_avg", "exp_avg_sq")}
    if like.ndim < 2:
        return {"variance": torch.zeros_like(like)}
    return {"row_var": like.new_zeros(like.shape[0], 1), "col_var": like.new_zeros(1, like.shape[1])}


def without_compile(train: TrainConfig) -> AbstractContextManager[object]:
    """Disables `torch.compile` of DeepSpeed's Muon kernels: it takes a minute on a CPU for a few matrix products."""
    return torch.compiler.set_stance("force_eager") if train.optimizer == "muon" else nullcontext()


def make_muon(matrices: Iterable[Group], others: Iterable[Group], train: TrainConfig) -> MuonWithAuxAdam:
    """Muon for groups of matrices, AdamW for other groups; each has `params`, `scale` and `weight_decay`."""
    numbers = _adamw_numbers(train)
    adamw = {key: numbers[key] for key in ("betas", "eps")}
    groups = [split for group in matrices for split in _by_inputs(group)]
    groups += [{**group, **adamw, "use_muon": False, "lr": 0.0} for group in others]
    optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"lr": 0.0, **numbers})
    optimizer.step = partial(_step_with_gradients, optimizer, optimizer.step)
    return optimizer


def _step_with_gradients(optimizer: MuonWithAuxAdam, step: Callable[..., object], *args: object) -> None:
    """Skip a step without gradients: DeepSpeed's Muon takes them for zeros, and momentum and decay move the weights.

    Not a subclass, because DeepSpeed checks for the exact classes that it has tested with ZeRO.
    """
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        step(*args)


def _by_inputs(group: Group) -> Iterator[Group]:
    """Groups of matrices with one number of inputs, whose updates get the RMS of AdamW's.

    An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)); DeepSpeed multiplies it by sqrt(max(1, m/n)), which makes
    1 / sqrt(n) of it. So n inputs ask for a scale of ADAMW_RMS sqrt(n). Decay is in units of the plain rate.
    """
    of_inputs: dict[int, list[torch.nn.Parameter]] = {}
    for matrix in group["params"]:
        of_inputs.setdefault(matrix.shape[1], []).append(matrix)
    for inputs, alike in of_inputs.items():
        to_adamw = ADAMW_RMS * inputs**0.5
        yield {
            "params": alike,
            "use_muon": True,
            "lr": 0.0,
            "momentum": MUON_MOMENTUM,
            "weight_decay": group["weight_decay"] / to_adamw,
            "scale": group["scale"] * to_adamw,
        }


def _adamw_numbers(train: TrainConfig) -> dict[str, Any]:
    return {"betas": (train.beta1, train.beta2), "eps": train.eps, "fused": True}
