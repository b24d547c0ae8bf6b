"""The dict that DeepSpeed gets: its own file plus what the configuration owns. A key set in both is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError, nearest
from lamda.config.resources import find
from lamda.config.schema import Config

OWNED_BY_CONFIG = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "nothing: it follows from the batch sizes and the number of ranks",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "wandb": "wandb.mode",
    "steps_per_print": "nothing: progress is the loop's own",
}
KNOWN = frozenset(
    [
        "bf16",
        "data_types",
        "communication_data_type",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "timers",
        "wall_clock_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
        "prescale_gradients",
        "gradient_predivide_factor",
        "memory_breakdown",
        "seq_parallel_communication_data_type",
        "disable_allgather",
        "checkpoint",
        "aio",
        "zero_force_ds_cpu_optimizer",
        "compile",
        "log_level",
    ]
)
REFUSED = {
    "fp16": "the model is trained in bf16 or fp32",
    "amp": "DeepSpeed 0.19.8 has removed it; use bf16",
    "torch_autocast": "bf16 parameters with fp32 masters are the one mixed precision here",
}


def build(config: Config, *, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` ranks. Raises UserError naming every wrong key at once."""
    path, own = find(config.deepspeed.config), read(config)
    problems = [*_problems_of_optimizer(own, path, config.train.optimizer), *_problems_of_lora(own, path, config)]
    if problems:
        raise UserError("\n".join(problems))
    train = config.train
    return {
        **own,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_rank(train, world=world),
        "gradient_clipping": train.gradient_clipping,
    }


def read(config: Config) -> dict[str, Any]:
    """What stands in DeepSpeed's file. Raises UserError naming every wrong key at once."""
    path = find(config.deepspeed.config)
    try:
        own = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(own, dict):
        raise UserError(f"{path}: holds no JSON object; DeepSpeed's file is one")
    if problems := _problems(own, path):
        raise UserError("\n".join(problems))
    return own


def zero_stage(own: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed dict asks for."""
    return int(own.get("zero_optimization", {}).get("stage", 0))


def is_bf16(own: dict[str, Any]) -> bool:
    """Whether parameters are bf16 (else fp32)."""
    return bool(own.get("bf16", {}).get("enabled", False))


def _problems(own: dict[str, Any], path: Path) -> list[str]:
    found = []
    for key in own:
        if key in OWNED_BY_CONFIG:
            found.append(f"{path}: {key}: set in the run's configuration as {OWNED_BY_CONFIG[key]}; take it out here")
        elif key in REFUSED:
            found.append(f"{path}: {key}: {REFUSED[key]}; take it out")
        elif key not in KNOWN:
            found.append(f"{path}: {key}: no key of DeepSpeed's that has an effect here{nearest(key, KNOWN)}")
    flat = [key for key in ("zero_optimization", "bf16") if not isinstance(own.get(key, {}), dict)]
    if flat:
        return [*found, *(f"{path}: {key}: holds no JSON object" for key in flat)]
    stage = own.get("zero_optimization", {}).get("stage", 0)
    if stage not in range(4):
        found.append(f"{path}: zero_optimization.stage: {stage} is none of 0, 1, 2, 3")
    elif zero_stage(own) == 0 and is_bf16(own) and "data_types" in own:
        found.append(
            f"{path}: data_types: DeepSpeed cannot accumulate bf16 gradients in fp32 at ZeRO stage 0; take "
            "data_types out, or use stage 1"
        )
    return found


def _problems_of_optimizer(own: dict[str, Any], path: Path, optimizer: str) -> list[str]:
    """Whether the optimiser sees whole matrices under this file, where it needs them (docs/training-log.md)."""
    stage = zero_stage(own)
    if optimizer == "adafactor" and stage != 0:
        return [
            f"{path}: zero_optimization.stage: {stage}: train.optimizer adafactor needs whole matrices, which ZeRO "
            "cuts up; use stage 0 (deepspeed/stage0.json), or another optimiser"
        ]
    accumulation = own.get("data_types", {}).get("grad_accum_dtype")
    sees_matrices = stage == 1 and accumulation == "fp32" if is_bf16(own) else stage == 0
    if optimizer == "muon" and not sees_matrices:
        return [
            f"{path}: train.optimizer muon: DeepSpeed orthogonalizes whole matrices, after clipping, at ZeRO stage 1 "
            "in bf16 with data_types.grad_accum_dtype fp32 (ds_config.json), and at stage 0 in fp32 "
            "(deepspeed/fp32.json); use one of these, or another optimizer"
        ]
    return []


def _problems_of_lora(own: dict[str, Any], path: Path, config: Config) -> list[str]:
    """Whether adapters can be trained under this file and beside the other keys."""
    train = config.train
    found: list[str] = []
    if train.lora_rank == 0:
        return found
    where = f"train.lora_rank {train.lora_rank}"
    if config.model.weights is None:
        found.append(f"{where}: adapters beside random weights learn nothing; set model.weights, or train.lora_rank 0")
    if train.fp8:
        found.append(f"{where}: train.fp8 rounds the matrices that adapters leave as they are; take one of them out")
    if train.optimizer != "adamw":
        found.append(f"{where}: train.optimizer {train.optimizer} is for whole matrices; set train.optimizer adamw")
    if train.base_width is not None:
        found.append(f"{where}: train.base_width gives whole matrices their rates, not adapters; take it out")
    if zero_stage(own) > 1:
        found.append(
            f"{path}: zero_optimization.stage: {zero_stage(own)}: {where} has next to no gradients to divide; use "
            "stage 1 (ds_config.json, deepspeed/fp32.json)"
        )
    return found
