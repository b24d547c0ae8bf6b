"""Optimizer state by parameter name, for every ZeRO stage.

DeepSpeed flattens parameters and gives each rank a span of them. A fragment is the piece of one parameter that a rank
owns: its fp32 weights and their optimizer state, as views to read and to fill. Saving and loading use only fragments,
so that stage and number of ranks may change in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from lamda.config.schema import OptimizerName
from lamda.engines.deepspeed.optimizer import State, fresh_state


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + len` of the flattened parameter `name`.

    tensors: "weight" and whatever state an element has, [numel] fp32 views of the optimizer's memory; for
    a parameter that is not trained only "frozen", a view of all of it in its own precision.
    factors: state of the full parameter (Adafactor's rows and columns), flat; the fragment is the full parameter then.
    is_owner: whether this rank saves it (rank 0 saves what every rank holds: all at stage 0, and what is frozen).
    """

    name: str
    start: int
    tensors: State
    factors: State
    is_owner: bool = True

    @property
    def weight(self) -> torch.Tensor:
        """The elements of the parameter, without the state."""
        return self.tensors["weight" if "weight" in self.tensors else "frozen"]


def reset_state(engine: deepspeed.DeepSpeedEngine, *, optimizer: OptimizerName, updates: int) -> None:
    """Give every parameter of this rank's optimizer fresh state, with its step counter at `updates`."""
    base = engine.basic_optimizer
    for group, parameter in _flat_parameters(engine):
        is_muon = group.get("use_muon", False)
        # Muon has no step counter; fused optimizers keep theirs on the device.
        device = parameter.device if group.get("fused") else torch.device("cpu")
        counter = {} if is_muon else {"step": torch.tensor(float(updates), device=device)}
        base.state.pop(parameter, None)  # first, so that old and new state are never there together
        base.state[parameter] = {**counter, **fresh_state(parameter.detach(), optimizer=optimizer, is_muon=is_muon)}


def fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's fragments, frozen ones first, in the model's order; state must exist (`reset_state`)."""
    stage, named = engine.zero_optimization_stage(), []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            named.append((name, parameter))
        else:
            yield Fragment(name, 0, {"frozen": parameter.detach().view(-1)}, {}, is_owner=engine.global_rank == 0)
    if stage == 0:
        yield from _stage0(engine, named)
    elif stage == 3:
        yield from _stage3(engine, named)
    else:
        yield from _stage12(engine, named)


def gathered_parameters(
    engine: deepspeed.DeepSpeedEngine, parameters: Sequence[torch.nn.Parameter]
) -> AbstractContextManager[object]:
    """The full parameters on every rank: at stage 3, where each rank holds a part, they are gathered."""
    if engine.zero_optimization_stage() != 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(parameters)


def publish_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy the fp32 weights, after they were filled, into the parameters that the model computes with."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.invalidate_secondary_tensor()  # the copy of zero_hpz_partition_size
        if hasattr(optimizer, "persistent_parameters") and optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif _has_masters(engine):
        for low_precision, fp32 in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low_precision, fp32, strict=True):
                parameter.data.copy_(master.data)


def _has_masters(engine: deepspeed.DeepSpeedEngine) -> bool:
    return hasattr(engine.optimizer, "fp32_groups")


def _flat_parameters(engine: deepspeed.DeepSpeedEngine) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """What the optimizer updates, each with its group.

    At stage 3 a flat parameter may hold pieces of several groups. Any group stands for it, because all of them use one
    optimizer there: `lamda.config.ds_config` rejects those that need whole matrices, Muon among them.
    """
    groups = engine.basic_optimizer.param_groups
    if engine.zero_optimization_stage() == 3:
        return [(groups[0], parameter) for parameter in engine.optimizer.fp32_partitioned_groups_flat]
    return [(group, parameter) for group in groups for parameter in group["params"]]


def _views(weight: torch.Tensor, state: State, *, start: int, numel: int) -> State:
    flat = {"weight": weight.detach().view(-1)}
    flat |= {kind: tensor.view(-1) for kind, tensor in state.items() if tensor.numel() == weight.numel()}
    return {kind: tensor.narrow(0, start, numel) for kind, tensor in flat.items() if kind != "step"}


def _factors(weight: torch.Tensor, state: State) -> State:
    return {
        kind: tensor.view(-1) for kind, tensor in state.items() if tensor.numel() != weight.numel() and kind != "step"
    }


def _stage0(engine: deepspeed.DeepSpeedEngine, named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[Fragment]:
    masters = {}
    if _has_masters(engine):
        for low_precision, fp32 in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update({id(parameter): master for parameter, master in zip(low_precision, fp32, strict=True)})
    for name, parameter in named:
        weight = masters.get(id(parameter), parameter)
        state = engine.basic_optimizer.state[weight]
        tensors = _views(weight, state, start=0, numel=weight.numel())
        yield Fragment(name, 0, tensors, _factors(weight, state), is_owner=engine.global_rank == 0)


def _stage12(engine: deepspeed.DeepSpeedEngine, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    # Any: DeepSpeed adds attributes to the parameters.
    flat = [parameter for _, parameter in _flat_parameters(engine)]
    state = engine.basic_optimizer.state
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat_parameter = flat[mapping.param_group_index]
            address = mapping.hp_fragment_address
            tensors = _views(flat_parameter, state[flat_parameter], start=address.start, numel=address.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, tensors, {})


def _stage3(engine: deepspeed.DeepSpeedEngine, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    optimizer, state = engine.optimizer, engine.basic_optimizer.state
    for name, parameter in named:
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = engine.global_rank * length
        numel = min(length, parameter.ds_numel - start)
        if numel > 0:
            flat_parameter = optimizer.fp32_partitioned_groups_flat[group]
            tensors = _views(flat_parameter, state[flat_parameter], start=offset, numel=numel)
            yield Fragment(name, start, tensors, {})
