"""`lamda plan`: what a run takes, worked out before anything is started, without torch and without a GPU.

Every figure is a closed form of the configuration; the tests hold them against PyTorch and DeepSpeed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from lamda.cluster.activations import RECOMPUTE, recomputed_flops
from lamda.cluster.communication import traffic
from lamda.cluster.data_path import data_rates, loader_bytes
from lamda.cluster.devices import DEVICES, RESERVE, Device, device_called
from lamda.cluster.disk import block_bytes, checkpoint_bytes, checkpoints, is_streamed, text_bytes
from lamda.cluster.fitting import largest_rows, nearest_that_fit
from lamda.cluster.interval import GPU_HOURS_A_FAILURE, best_interval, lost_share, seconds_between_failures
from lamda.cluster.memory import Setting, by_phase, items, model_states, parameter_sizes, peak
from lamda.cluster.plan_text import plan_text
from lamda.cluster.sharding import Sharding
from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.model.counts import flops_per_token, parameters, parameters_by_part


@dataclass(frozen=True)
class Machine:
    """The GPUs and what is assumed of them.

    mfu: share of the data sheet's FLOP/s that training reaches. price: of a GPU-hour. save_seconds: how long
    training waits for a checkpoint.
    """

    gpus: int = 1
    gpu: str = "h100"
    mfu: float = 0.45
    price: float | None = None
    save_seconds: float = 10.0

    @property
    def device(self) -> Device:
        """The kind of GPU. Raises UserError."""
        return device_called(self.gpu)

    def check(self) -> None:
        """Raises UserError, which names everything that cannot be."""
        wrong = []
        if self.gpus < 1:
            wrong.append(f"--gpus: a run needs at least 1 rank, not {self.gpus}")
        if not 0 < self.mfu <= 1:
            wrong.append(f"--mfu: a share of the peak rate is above 0 and at most 1, not {self.mfu:g}")
        if self.price is not None and self.price < 0:
            wrong.append(f"--price: a GPU-hour costs at least 0, not {self.price:g}")
        if self.save_seconds <= 0:
            wrong.append(f"--save-seconds: a checkpoint takes more than 0 seconds, not {self.save_seconds:g}")
        try:
            _ = self.device
        except UserError as error:
            wrong.append(str(error))
        if wrong:
            raise UserError("\n".join(wrong))


def parser() -> ConfigParser:
    """The options of `lamda plan`."""
    parser = ConfigParser("lamda plan", epilog="exit code: 0 if the run fits, 1 if it does not")
    add = parser.add_argument
    add("--gpus", type=int, default=Machine.gpus, metavar="N", help="ranks, one per GPU; default %(default)s")
    add("--gpu", default=Machine.gpu, metavar="NAME", help=f"{', '.join(DEVICES)}; default %(default)s")
    add("--mfu", type=float, default=Machine.mfu, metavar="SHARE", help="assumed MFU; default %(default)s")
    add("--price", type=float, default=Machine.price, metavar="P", help="price of a GPU-hour, for the cost")
    add(
        "--save-seconds", type=float, default=Machine.save_seconds, metavar="S",
        help="seconds that training waits for a checkpoint; default %(default)g",
    )  # fmt: skip
    add("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`[--gpus N] [--gpu NAME] [--mfu SHARE] [--price P] [--save-seconds S] [--json] --config FILE ...`.

    Returns 1 where the run does not fit. Raises UserError.
    """
    options, rest = parser().parse_known_args(argv)
    as_json = vars(options).pop("json")
    planned = plan(load_config(rest), Machine(**vars(options)))
    print(json.dumps(planned, indent=2) if as_json else plan_text(planned))
    return 0 if planned["memory"]["fits"] else 1


def plan(config: Config, machine: Machine) -> dict[str, Any]:
    """Everything that `lamda plan` says, in plain units: bytes, seconds, FLOPs.

    Raises UserError where the ranks cannot share the batch, naming the nearest numbers that can, and for
    a DeepSpeed file with wrong keys. What does not fit is told in `warnings`, with the nearest settings that do.
    """
    machine.check()
    own = ds_config.build(config, world=machine.gpus)
    sharding = Sharding.of(own, ranks=machine.gpus)
    accumulation = own["gradient_accumulation_steps"]
    setting = Setting.of(config, sharding, accumulation=accumulation)
    counted = _counts(config, machine, accumulation)
    memory = _memory(config, machine, setting)
    spent = _time(counted, machine, is_bf16=sharding.is_bf16)
    sent = traffic(parameter_sizes(config.model), sharding, accumulation=accumulation)
    rates = data_rates(config, ranks=machine.gpus, tokens_per_second=spent["tokens_per_second"])
    return {
        **counted,
        "memory": memory,
        "communication": [asdict(each) for each in sent],
        "sent_bytes_per_second": sum(each.sent for each in sent) / spent["step_seconds"],
        "time": spent,
        "data_per_second": asdict(rates),
        "disk": _disk(config, width=sharding.weight),
        "checkpoint_interval": _interval(config, machine, step_seconds=spent["step_seconds"]),
        "warnings": _warnings(config, machine, setting, memory, own),
    }


def _counts(config: Config, machine: Machine, accumulation: int) -> dict[str, Any]:
    """Parameters, the arithmetic of batches, and FLOPs."""
    train, length = config.train, config.data.sequence_length
    tokens_per_step = train.global_batch_size * length
    flops = flops_per_token(config.model, length)
    return {
        "parameters": parameters(config.model),
        "parameters_by_part": parameters_by_part(config.model),
        "gpus": machine.gpus,
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation": accumulation,
        "global_batch_size": train.global_batch_size,
        "sequence_length": length,
        "tokens_per_step": tokens_per_step,
        "steps": config.steps,
        "tokens": config.steps * tokens_per_step,
        "flops_per_token": flops,
        "flops": flops * config.steps * tokens_per_step,
    }


def _memory(config: Config, machine: Machine, setting: Setting) -> dict[str, Any]:
    """A rank's, item by item; and under each kind of recomputation, and at each ZeRO stage."""
    limit, length = machine.device.usable, config.data.sequence_length
    found, flops = items(setting), flops_per_token(config.model, length)
    by_recompute = {
        recompute: {
            "activations": other.activations.peak,
            "flops_per_token": flops + recomputed_flops(config.model, length=length, recompute=recompute),
            **_judged(other, config, limit=limit),
        }
        for recompute in RECOMPUTE
        for other in [replace(setting, recompute=recompute)]
    }
    by_stage = {
        str(stage): {"model_states": model_states(items(other)), **_judged(other, config, limit=limit)}
        for stage in range(4)
        for other in [replace(setting, sharding=setting.sharding.at_stage(stage))]
    }
    return {
        "gpu": machine.gpu,
        "gpu_bytes": round(machine.device.gigabytes * 1e9),
        "usable_bytes": limit,
        "reserve": RESERVE,
        "zero_stage": setting.sharding.stage,
        "bf16": setting.sharding.is_bf16,
        "attention": config.model.attention,
        "recompute": setting.recompute,
        "items": [asdict(item) for item in found],
        "phases": by_phase(found),
        **_judged(setting, config, limit=limit),
        "by_recompute": by_recompute,
        "by_stage": by_stage,
        "host_bytes_at_start": 4 * parameters(config.model),
        "host_bytes_of_rows": loader_bytes(config, ranks=machine.gpus),
    }


def _judged(setting: Setting, config: Config, *, limit: int) -> dict[str, Any]:
    """What a rank needs, whether that fits, and the largest micro-batch that does (None where none does)."""
    needed = peak(setting)
    rows = largest_rows(setting, batch=config.train.global_batch_size, limit=limit)
    return {"peak": needed, "fits": needed <= limit, "largest_micro_batch_size": rows}


def _time(counted: dict[str, Any], machine: Machine, *, is_bf16: bool) -> dict[str, Any]:
    """To the end of the run, failures and saving aside."""
    rate = machine.gpus * machine.device.peak(is_bf16=is_bf16) * machine.mfu
    seconds = counted["flops"] / rate
    hours = machine.gpus * seconds / 3600
    return {
        "mfu": machine.mfu,
        "peak_flops_per_gpu": machine.device.peak(is_bf16=is_bf16),
        "tokens_per_second": rate / counted["flops_per_token"],
        "step_seconds": seconds / counted["steps"],
        "seconds": seconds,
        "gpu_hours": hours,
        "price": machine.price,
        "cost": None if machine.price is None else hours * machine.price,
    }


def _disk(config: Config, *, width: int) -> dict[str, Any]:
    one, count = checkpoint_bytes(parameters(config.model), width=width), checkpoints(config)
    return {
        "checkpoint_bytes": one,
        "checkpoints": count,
        "checkpoints_bytes": one * count,
        "keeps_blocks": config.data.cache_dir is not None,
        "blocks_bytes": block_bytes(config),
        "text_bytes": text_bytes(config),
        "text_is_streamed": is_streamed(config),
    }


def _interval(config: Config, machine: Machine, *, step_seconds: float) -> dict[str, Any]:
    own = config.checkpoint.every * step_seconds
    best = best_interval(save_seconds=machine.save_seconds, gpus=machine.gpus)
    return {
        "gpu_hours_a_failure": GPU_HOURS_A_FAILURE,
        "seconds_between_failures": seconds_between_failures(machine.gpus),
        "save_seconds": machine.save_seconds,
        "best_seconds": best,
        "best_steps": max(1, round(best / step_seconds)),
        "best_lost_share": lost_share(best, save_seconds=machine.save_seconds, gpus=machine.gpus),
        "configured_seconds": own,
        "configured_steps": config.checkpoint.every,
        "configured_lost_share": lost_share(own, save_seconds=machine.save_seconds, gpus=machine.gpus),
    }


def _warnings(
    config: Config, machine: Machine, setting: Setting, memory: dict[str, Any], own: dict[str, Any]
) -> list[str]:
    found = []
    limit = memory["usable_bytes"]
    if not memory["fits"]:
        ways = nearest_that_fit(setting, batch=config.train.global_batch_size, limit=limit)
        found.append(_too_large(memory, machine, ways))
    for key in ("offload_optimizer", "offload_param"):
        if own.get("zero_optimization", {}).get(key):
            found.append(f"{config.deepspeed.config}: zero_optimization.{key}: this plan counts nothing as offloaded")
    if rank := config.train.lora_rank:
        found.append(f"train.lora_rank {rank}: this plan counts a run that trains all weights, which needs more")
    return found


def _too_large(memory: dict[str, Any], machine: Machine, ways: list[str]) -> str:
    needed, limit = memory["peak"] / 1e9, memory["usable_bytes"] / 1e9
    told = f"does not fit: a rank needs {needed:.1f} GB and can count on {limit:.1f} GB of its {machine.gpu}"
    if ways:
        return f"{told}; what would fit: {'; or '.join(ways)}"
    start = memory["phases"]["start"]
    if start > memory["usable_bytes"]:
        return f"{told}; every rank makes the whole model first, {start / 1e9:.1f} GB in fp32, whatever the settings"
    return f"{told}, and no setting of this batch does; take a GPU with more memory or a smaller model"
