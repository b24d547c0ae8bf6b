"""The dict that DeepSpeed gets: its own file plus what the configuration sets. A key set in both is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

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
OffloadKey = Literal["offload_optimizer", "offload_param"]
OFFLOAD: tuple[OffloadKey, ...] = get_args(OffloadKey)
_RENAMED = "DeepSpeed has renamed it; use {} (deepspeed/offload-cpu.json)"
_QUANTIZED = "rounds what the ranks exchange to 8 bits or less, so that results depend on their number; remove it"
REFUSED_ZERO = {
    "cpu_offload": _RENAMED.format("offload_optimizer"),
    "cpu_offload_param": _RENAMED.format("offload_param"),
    "cpu_offload_use_pin_memory": _RENAMED.format("offload_optimizer.pin_memory"),
    "zenflow": "applies gradients in later steps, so no resume is exact; remove it",
    "zero_quantized_weights": _QUANTIZED,
    "zero_quantized_gradients": _QUANTIZED,
    "zeropp_loco_param": _QUANTIZED,
    "zero_quantized_nontrainable_weights": "needs frozen weights at ZeRO stage 3, where none are trained; remove it",
}
"""Keys of `zero_optimization`, unless they are false or null."""
SECTIONS = ("zero_optimization", "bf16", "data_types")
"""The sections that are read here; DeepSpeed checks the others (`lamda.engines.deepspeed.framework`)."""
KNOWN = frozenset({
    "bf16", "data_types", "communication_data_type", "zero_optimization", "zero_allow_untested_optimizer", "timers",
    "wall_clock_breakdown", "dump_state", "comms_logger", "flops_profiler", "prescale_gradients",
    "gradient_predivide_factor", "memory_breakdown", "disable_allgather",
    "checkpoint", "aio", "zero_force_ds_cpu_optimizer", "compile", "log_level",
})  # fmt: skip
REFUSED = {
    "fp16": "the model is trained in bf16 or fp32",
    "amp": "DeepSpeed 0.19.8 has removed it; use bf16",
    "torch_autocast": "the only supported mixed precision is bf16 parameters with fp32 masters",
    "tensor_parallel": "DeepSpeed would split the heads, but not their biases; shard with ZeRO stage 3, or in JAX with "
    "flax.tensor (docs/parallelism.md)",
    **dict.fromkeys(
        ("sequence_parallel_size", "data_parallel_size"),
        "a rank's attention would not see the others' part of a row; shard with ZeRO stage 3 (docs/parallelism.md)",
    ),
}


def build(config: Config, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world_size` ranks. Raises UserError with all wrong keys."""
    path, ds_config = find(config.deepspeed.config), read(config)
    problems = [
        *_problems_of_optimizer(ds_config, path, config.train.optimizer),
        *_problems_of_lora(ds_config, path, config),
        *_problems_of_offload(ds_config, path, config),
        *_problems_of_second_copy(ds_config, path, world_size),
    ]
    if problems:
        raise UserError("\n".join(problems))
    train = config.train
    return {
        **ds_config,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_rank(train, world_size=world_size),
        "gradient_clipping": train.gradient_clipping,
    }


def read(config: Config) -> dict[str, Any]:
    """DeepSpeed's own file. Raises UserError with all wrong keys."""
    path = find(config.deepspeed.config)
    try:
        ds_config = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(ds_config, dict):
        raise UserError(f"{path}: is not a JSON object, which DeepSpeed's file must be")
    if problems := _problems(ds_config, path):
        raise UserError("\n".join(problems))
    return ds_config


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def is_bf16(ds_config: dict[str, Any]) -> bool:
    """Whether parameters are bf16 (else fp32)."""
    return bool(ds_config.get("bf16", {}).get("enabled", False))


def offload_device(ds_config: dict[str, Any], key: OffloadKey) -> str:
    """Where optimizer state or parameters are kept: "none" (the GPU), "cpu" or "nvme"."""
    return str((ds_config.get("zero_optimization", {}).get(key) or {}).get("device", "none"))


def _problems(ds_config: dict[str, Any], path: Path) -> list[str]:
    problems = []
    for key in ds_config:
        if key in OWNED_BY_CONFIG:
            problems.append(f"{path}: {key}: set in the run's configuration as {OWNED_BY_CONFIG[key]}; remove it here")
        elif key in REFUSED:
            problems.append(f"{path}: {key}: {REFUSED[key]}; remove it")
        elif key not in KNOWN:
            problems.append(f"{path}: {key}: not a DeepSpeed key with an effect here{nearest(key, KNOWN)}")
    flat = [key for key in SECTIONS if not isinstance(ds_config.get(key, {}), dict)]
    if "zero_optimization" not in flat:
        zero = ds_config.get("zero_optimization", {})
        flat += [f"zero_optimization.{key}" for key in OFFLOAD if not isinstance(zero.get(key), dict | None)]
    if flat:
        return [*problems, *(f"{path}: {key}: is not a JSON object" for key in flat)]
    if not isinstance(enabled := ds_config.get("bf16", {}).get("enabled", False), bool):
        problems.append(f"{path}: bf16.enabled: {enabled!r} must be true or false")
    zero = ds_config.get("zero_optimization", {})
    problems += [
        f"{path}: zero_optimization.{key}: {reason}"
        for key, reason in REFUSED_ZERO.items()
        if zero.get(key) not in (None, False)
    ]
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in range(4):
        problems.append(f"{path}: zero_optimization.stage: {stage} must be 0, 1, 2 or 3")
    elif zero_stage(ds_config) == 0 and is_bf16(ds_config) and "data_types" in ds_config:
        problems.append(
            f"{path}: data_types: DeepSpeed cannot accumulate bf16 gradients in fp32 at ZeRO stage 0; remove "
            "data_types, or use stage 1"
        )
    return problems


def _problems_of_optimizer(ds_config: dict[str, Any], path: Path, optimizer: str) -> list[str]:
    """Whether an optimizer that needs whole matrices gets them with this file (docs/training-log.md)."""
    stage = zero_stage(ds_config)
    if optimizer == "adafactor" and stage != 0:
        return [
            f"{path}: zero_optimization.stage: {stage}: train.optimizer adafactor needs whole matrices, which ZeRO "
            "shards; use stage 0 (deepspeed/stage0.json), or another optimizer"
        ]
    accumulation = ds_config.get("data_types", {}).get("grad_accum_dtype")
    sees_matrices = stage == 1 and accumulation == "fp32" if is_bf16(ds_config) else stage == 0
    if optimizer == "muon" and not sees_matrices:
        return [
            f"{path}: train.optimizer muon: DeepSpeed orthogonalizes whole matrices, after clipping, at ZeRO stage 1 "
            "in bf16 with data_types.grad_accum_dtype fp32 (ds_config.json), and at stage 0 in fp32 "
            "(deepspeed/fp32.json); use one of these, or another optimizer"
        ]
    return []


def _problems_of_lora(ds_config: dict[str, Any], path: Path, config: Config) -> list[str]:
    """Whether adapters can be trained with this file and the other keys."""
    train = config.train
    problems: list[str] = []
    if train.lora_rank == 0:
        return problems
    where = f"train.lora_rank {train.lora_rank}"
    if config.model.weights is None:
        problems.append(f"{where}: adapters on random weights learn nothing; set model.weights, or train.lora_rank 0")
    if train.fp8:
        problems.append(f"{where}: train.fp8 would round the frozen matrices; remove one of the two")
    if train.optimizer != "adamw":
        problems.append(f"{where}: train.optimizer {train.optimizer} cannot train adapters; set train.optimizer adamw")
    if train.base_width is not None:
        problems.append(f"{where}: train.base_width has no learning rates for adapters; remove it")
    if zero_stage(ds_config) > 1:
        problems.append(
            f"{path}: zero_optimization.stage: {zero_stage(ds_config)}: {where} has almost no gradients to shard; use "
            "stage 1 (ds_config.json, deepspeed/fp32.json)"
        )
    return problems


def _problems_of_second_copy(ds_config: dict[str, Any], path: Path, world_size: int) -> list[str]:
    """Whether the ranks can be divided into groups that each have a copy of the weights between them."""
    size = ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if not isinstance(size, int) or size <= 1 or world_size % min(size, world_size) == 0:
        return []
    return [f"{path}: zero_optimization.zero_hpz_partition_size: {size} does not divide the {world_size} ranks"]


def _problems_of_offload(ds_config: dict[str, Any], path: Path, config: Config) -> list[str]:
    """Whether what the file offloads trains and resumes exactly here (docs/offload.md)."""
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    devices = {key: device for key in OFFLOAD if (device := offload_device(ds_config, key)) != "none"}
    problems = [
        f"{path}: zero_optimization.{key}.device: {device} is not supported: checkpoints reach only state in memory; "
        "use cpu (deepspeed/offload-cpu.json)"
        for key, device in devices.items()
        if device != "cpu"
    ]
    if "offload_param" in devices and stage != 3:
        problems.append(f"{path}: zero_optimization.offload_param: needs zero_optimization.stage 3, not {stage}")
    if "offload_optimizer" not in devices:
        return problems
    where = "zero_optimization.offload_optimizer"
    if stage < 2:
        problems.append(
            f"{path}: {where}: at stage {stage} DeepSpeed adds gradients up in the precision of the weights; use stage "
            "2 (deepspeed/offload-cpu.json)"
        )
    if ds_config.get("zero_force_ds_cpu_optimizer", True):
        problems.append(
            f"{path}: zero_force_ds_cpu_optimizer: must be false with {where}: the optimizer is PyTorch's, so that a "
            "run can change between offload and none"
        )
    own = {"ratio": 1.0, "super_offload": False}
    problems += [
        f"{path}: {where}.{key}: needs DeepSpeed's own optimizer on the CPU, whose steps differ; remove it"
        for key, default in own.items()
        if zero["offload_optimizer"].get(key, default) != default
    ]
    if config.train.optimizer != "adamw":
        problems.append(f"{path}: {where}: only train.optimizer adamw is offloaded, not {config.train.optimizer}")
    if config.train.lora_rank:
        problems.append(f"{path}: {where}: adapters have almost no optimizer state; use ds_config.json")
    return problems
