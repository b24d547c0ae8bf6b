"""The optimiser's state by parameter name, whatever ZeRO stage holds it.

DeepSpeed flattens parameters and gives each rank a stretch of them. A fragment is the piece of one
parameter that a rank owns: its fp32 weights and moments, as views to read and to fill. Saving and
loading go through fragments alone, so that stages and numbers of ranks may change in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + len` of the flattened parameter `name`.

    tensors: "weight" and each of MOMENTS, [numel] fp32 views of the optimiser's own memory.
    is_owner: whether this rank saves it (at stage 0 every rank holds all, and rank 0 saves).
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    is_owner: bool = True

    @property
    def numel(self) -> int:
        """Elements of this piece."""
        return self.tensors["weight"].numel()


def reset_moments(engine: DeepSpeedEngine, *, updates: int) -> None:
    """Give every flat parameter of this rank zero moments after `updates` steps of AdamW."""
    base = engine.basic_optimizer
    for parameter in _flat_parameters(engine):
        base.state[parameter] = {
            "step": torch.tensor(float(updates), device=_step_device(base, parameter)),
            **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
        }


def fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's fragments, in the order of the model's parameters; moments must exist (`reset_moments`)."""
    stage = engine.zero_optimization_stage()
    named = list(engine.module.named_parameters())
    if stage == 0:
        yield from _whole(engine, named)
    elif stage == 3:
        yield from _partitioned(engine, named)
    else:
        yield from _flattened(engine, named)


def publish_weights(engine: DeepSpeedEngine) -> None:
    """After the fp32 weights were filled: bring them into the parameters that the model computes with."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if hasattr(optimizer, "persistent_parameters") and optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif _has_masters(engine):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(narrow, wide, strict=True):
                parameter.data.copy_(master.data)


def _has_masters(engine: DeepSpeedEngine) -> bool:
    return hasattr(engine.optimizer, "fp32_groups")


def _flat_parameters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _step_device(base: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    fused = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    return parameter.device if fused else torch.device("cpu")


def _views(weight: torch.Tensor, state: dict[str, torch.Tensor], *, start: int, numel: int) -> dict[str, torch.Tensor]:
    flat = {"weight": weight.detach().view(-1), **{moment: state[moment].view(-1) for moment in MOMENTS}}
    return {kind: tensor.narrow(0, start, numel) for kind, tensor in flat.items()}


def _whole(engine: DeepSpeedEngine, named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[Fragment]:
    masters = {}
    if _has_masters(engine):
        for narrow, wide in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update({id(parameter): master for parameter, master in zip(narrow, wide, strict=True)})
    for name, parameter in named:
        weight = masters.get(id(parameter), parameter)
        state = engine.basic_optimizer.state[weight]
        tensors = _views(weight, state, start=0, numel=weight.numel())
        yield Fragment(name, 0, tensors, is_owner=engine.global_rank == 0)


def _flattened(engine: DeepSpeedEngine, named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[Fragment]:
    flat = _flat_parameters(engine)
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is not None:
            whole = flat[mapping.param_group_index]
            place = mapping.hp_fragment_address
            tensors = _views(whole, engine.basic_optimizer.state[whole], start=place.start, numel=place.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, tensors)


def _partitioned(engine: DeepSpeedEngine, named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, parameter in named:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = engine.global_rank * length
        numel = min(length, parameter.ds_numel - start)
        if numel > 0:
            whole = optimizer.fp32_partitioned_groups_flat[group]
            tensors = _views(whole, engine.basic_optimizer.state[whole], start=offset, numel=numel)
            yield Fragment(name, start, tensors)
