"""Whether a run's blocks are compiled, and how: once, for one shape, and never again after the first step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.config.stages import plan_stages
from lamda.model.counts import flops_per_token

if TYPE_CHECKING:
    from lamda.model import LaMDA

WORTH_FLOPS = {"cpu": 3e14, "cuda": 1e18}  # of a run; compiling costs most of a minute and saves a quarter of the time


def is_worthwhile(config: Config, device_type: str, *, stage: int) -> bool:
    """Whether to compile, by `train.compile`, on a device of type "cpu" or "cuda"; `auto` depends on the
    run's length only, so a resumed run does the same. Needs no torch.

    Raises UserError at ZeRO stage 3, whose hooks gather weights inside a block.
    """
    if stage == 3:
        if config.train.compile == "always":
            raise UserError("train.compile is always, but ZeRO stage 3 cannot be compiled: use stage 2, or `never`")
        return False
    if config.train.compile != "auto":
        return config.train.compile == "always"
    return run_flops(config) > WORTH_FLOPS.get(device_type, 0.0)


def run_flops(config: Config) -> float:
    """FLOPs of the whole run."""
    flops = 0
    for stage in plan_stages(config):
        length, rank = stage.config.data.sequence_length, stage.config.train.lora_rank
        flops += stage.rows * length * flops_per_token(config.model, length, lora_rank=rank)
    return float(flops)


def compile_blocks(model: LaMDA) -> None:
    """Compile the blocks; they have the same shapes and share the compiled code."""
    for block in model.layers:
        block.compile(dynamic=False)


def no_recompile(*, compiled: bool, first: bool) -> AbstractContextManager[object]:
    """Wraps a step. Only the `first` may compile; later ones raise RuntimeError rather than compile again."""
    import torch

    return torch.compiler.set_stance("fail_on_recompile") if compiled and not first else nullcontext()


def force_eager(*, compiled: bool) -> AbstractContextManager[object]:
    """Wraps everything that has other shapes, or no gradients."""
    import torch

    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
