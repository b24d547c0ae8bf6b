"""`lamda plan`: memory, time, cost and disk of a run, computed without torch and without a GPU before it starts.

All figures are closed forms of the configuration; the tests compare them with PyTorch and DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

from lamda.cluster import estimates
from lamda.cluster.estimates import DEVICES, Device, unknown_device
from lamda.cluster.memory import (
    RECOMPUTE,
    MemorySetting,
    activations,
    by_phase,
    host_bytes_at_start,
    host_bytes_offloaded,
    items,
    model_states,
    parameter_sizes,
    peak,
    recomputed_flops,
    snapshot_bytes,
)
from lamda.cluster.plan_text import MemoryPlan, Plan, RecomputePlan, RunStage, StagePlan, TimePlan, plan_text
from lamda.cluster.zero import Sharding, traffic
from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.config.schema import Backend, Config
from lamda.config.stages import Stage, plan_stages
from lamda.model.counts import flops_per_token, parameters, parameters_by_part

MAX_SUGGESTIONS = 5


@dataclass(frozen=True)
class Machine:
    """The GPUs and the assumptions about them.

    mfu: fraction of the data sheet's FLOP/s that training reaches. price: of a GPU-hour. save_seconds: how long
    training waits for a checkpoint.
    """

    gpus: int = 1
    gpu: str = "h100"
    mfu: float = 0.45
    price: float | None = None
    save_seconds: float = 10.0

    @property
    def device(self) -> Device:
        """The kind of GPU."""
        return DEVICES[self.gpu]

    def check(self) -> None:
        """Raises UserError with a line for every invalid value."""
        checks = (
            (self.gpus >= 1, f"--gpus: a run needs at least 1 rank, not {self.gpus}"),
            (0 < self.mfu <= 1, f"--mfu: a share of the peak rate is above 0 and at most 1, not {self.mfu:g}"),
            ((self.price or 0) >= 0, f"--price: a GPU-hour costs at least 0, not {self.price or 0:g}"),
            (self.save_seconds > 0, f"--save-seconds: a checkpoint takes more than 0 s, not {self.save_seconds:g}"),
            (self.gpu in DEVICES, f"--gpu: {unknown_device(self.gpu)}"),
        )
        if problems := [problem for is_right, problem in checks if not is_right]:
            raise UserError("\n".join(problems))


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
    """As `lamda plan --help` says; 1 if the run does not fit. Raises UserError."""
    options, rest = parser().parse_known_args(argv)
    as_json = vars(options).pop("json")
    planned = plan(load_config(rest), Machine(**vars(options)))
    print(json.dumps(asdict(planned), indent=2) if as_json else plan_text(planned))
    return 0 if planned.memory.fits else 1


def plan(config: Config, machine: Machine) -> Plan:
    """Plan a run.

    Raises UserError if the ranks cannot share the batch, with the nearest numbers that can, and for a DeepSpeed
    file with wrong keys. If the run does not fit, `warnings` names the nearest settings that do.
    """
    machine.check()
    stages = plan_stages(config)
    if len(stages) == 1:
        return _plan_stage(stages[0].config, machine)
    parts = {stage.name: _plan_stage(_as_run(stage), machine) for stage in stages}
    return _added_up(config, parts)


def _as_run(stage: Stage) -> Config:
    """A stage as a run of its own."""
    steps = {"steps": stage.last - stage.first, "tokens": None}
    return stage.config.model_copy(update={"train": stage.config.train.model_copy(update=steps)})


def _added_up(config: Config, parts: Mapping[str, Plan]) -> Plan:
    """The plan of a run from those of its stages, by name."""
    plans = list(parts.values())
    largest = max(plans, key=lambda each: each.memory.peak)
    return replace(
        largest,
        steps=sum(each.steps for each in plans),
        tokens=sum(each.tokens for each in plans),
        flops=sum(each.flops for each in plans),
        time=_added_time(plans, largest.time),
        disk=_added_disk(config, plans, largest.disk),
        warnings=[f"stage {name}: {text}" for name, each in parts.items() for text in each.warnings],
        stages=[
            RunStage(
                name, each.steps, each.global_batch_size, each.sequence_length, each.tokens, each.time.seconds,
                each.memory.peak, each.memory.fits,
            )
            for name, each in parts.items()
        ],
    )  # fmt: skip


def _added_time(plans: Sequence[Plan], of_largest: TimePlan) -> TimePlan:
    seconds = sum(each.time.seconds for each in plans)
    return replace(
        of_largest,
        tokens_per_second=sum(each.tokens for each in plans) / seconds,
        step_seconds=seconds / sum(each.steps for each in plans),
        seconds=seconds,
        gpu_hours=sum(each.time.gpu_hours for each in plans),
        cost=None if of_largest.cost is None else sum(each.time.cost or 0.0 for each in plans),
    )


def _added_disk(config: Config, plans: Sequence[Plan], of_largest: estimates.DiskUse) -> estimates.DiskUse:
    texts = {str((each.config.data.corpus, each.config.data.files)): each.config for each in plan_stages(config)}
    sizes = [estimates.text_bytes(each) for each in texts.values()]
    checkpoints = estimates.checkpoints(config)
    return replace(
        of_largest,
        checkpoints=checkpoints,
        checkpoints_bytes=checkpoints * of_largest.checkpoint_bytes,
        blocks_bytes=sum(each.disk.blocks_bytes for each in plans),
        text_bytes=None if None in sizes else sum(size or 0 for size in sizes),
    )


def _plan_stage(config: Config, machine: Machine) -> Plan:
    deepspeed = ds_config.build(config, world_size=machine.gpus)
    sharding, accumulation = Sharding.of(deepspeed, ranks=machine.gpus), deepspeed["gradient_accumulation_steps"]
    setting = MemorySetting.of(config, sharding, accumulation=accumulation, capability=machine.device.capability)
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    flops = flops_per_token(config.model, config.data.sequence_length)
    memory = _plan_memory(config, machine, setting)
    time = _plan_time(config.steps, tokens_per_step, flops, machine, is_bf16=sharding.is_bf16)
    communication = traffic(parameter_sizes(config.model), sharding, accumulation=accumulation)
    return Plan(
        parameters=parameters(config.model),
        parameters_by_part=parameters_by_part(config.model),
        gpus=machine.gpus,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=accumulation,
        global_batch_size=config.train.global_batch_size,
        sequence_length=config.data.sequence_length,
        tokens_per_step=tokens_per_step,
        steps=config.steps,
        tokens=config.steps * tokens_per_step,
        flops_per_token=flops,
        flops=flops * config.steps * tokens_per_step,
        memory=memory,
        communication=communication,
        sent_bytes_per_second=sum(each.sent for each in communication) / time.step_seconds,
        time=time,
        data_per_second=estimates.data_rates(config, ranks=machine.gpus, tokens_per_second=time.tokens_per_second),
        disk=estimates.disk_use(config, width=sharding.weight),
        checkpoint_interval=estimates.checkpoint_interval(
            config, gpus=machine.gpus, save_seconds=machine.save_seconds, step_seconds=time.step_seconds
        ),
        warnings=[*_warnings(config, setting, memory)],
        stages=[],
    )


def _plan_memory(config: Config, machine: Machine, setting: MemorySetting) -> MemoryPlan:
    limit, length, batch = machine.device.usable, config.data.sequence_length, config.train.global_batch_size
    flops = flops_per_token(config.model, length)

    def fit(setting: MemorySetting) -> tuple[int, bool, int | None]:
        needed = peak(setting)
        largest = next((each.rows for each in _micro_batches(setting, batch=batch) if peak(each) <= limit), None)
        return needed, needed <= limit, largest

    by_recompute, by_stage = {}, {}
    for recompute in RECOMPUTE:
        other = replace(setting, recompute=recompute)
        extra = recomputed_flops(config.model, length=length, recompute=recompute)
        by_recompute[recompute] = RecomputePlan(*fit(other), activations(other).peak, flops + extra)
    for stage in range(4):
        other = replace(setting, sharding=setting.sharding.at_stage(stage))
        by_stage[str(stage)] = StagePlan(*fit(other), model_states(items(other)))
    return MemoryPlan(
        *fit(setting),
        gpu=machine.gpu,
        gpu_bytes=machine.device.memory,
        usable_bytes=limit,
        reserve=estimates.RESERVED_FRACTION,
        zero_stage=setting.sharding.stage,
        bf16=setting.sharding.is_bf16,
        attention=setting.attention,
        recompute=setting.recompute,
        items=items(setting),
        phases=by_phase(items(setting)),
        by_recompute=by_recompute,
        by_stage=by_stage,
        host_bytes_at_start=host_bytes_at_start(setting),
        host_bytes_offloaded=host_bytes_offloaded(setting),
        host_bytes_of_rows=estimates.loader_bytes(config, ranks=machine.gpus),
        host_bytes_of_snapshot=snapshot_bytes(setting),
    )


def _plan_time(steps: int, tokens_per_step: int, flops: int, machine: Machine, *, is_bf16: bool) -> TimePlan:
    peak_flops = machine.device.peak(is_bf16=is_bf16)
    rate = machine.gpus * peak_flops * machine.mfu
    seconds = flops * steps * tokens_per_step / rate
    hours = machine.gpus * seconds / 3600
    return TimePlan(
        mfu=machine.mfu,
        peak_flops_per_gpu=peak_flops,
        tokens_per_second=rate / flops,
        step_seconds=seconds / steps,
        seconds=seconds,
        gpu_hours=hours,
        price=machine.price,
        cost=None if machine.price is None else hours * machine.price,
    )


def _warnings(config: Config, setting: MemorySetting, memory: MemoryPlan) -> Iterator[str]:
    if not memory.fits:
        limit = memory.usable_bytes
        yield _too_large(memory, nearest_that_fit(setting, batch=config.train.global_batch_size, limit=limit))
    if rank := config.train.lora_rank:
        yield f"train.lora_rank {rank}: this plan counts a run that trains all weights, which needs more"


def _too_large(memory: MemoryPlan, ways: list[str]) -> str:
    needed, limit = memory.peak / 1e9, memory.usable_bytes / 1e9
    message = f"does not fit: a rank needs {needed:.1f} GB and can count on {limit:.1f} GB of its {memory.gpu}"
    if ways:
        return f"{message}; what would fit: {'; or '.join(ways)}"
    return f"{message}, and no setting of this batch does; take a GPU with more memory or a smaller model"


def nearest_that_fit(setting: MemorySetting, *, batch: int, limit: int) -> list[str]:
    """The settings that fit with the fewest changes, as lists of changes; empty if none does."""
    counts: dict[str, int] = {}
    for found in _candidates(setting, batch=batch, limit=limit):
        changes = _changes(setting, found)
        counts.setdefault(", ".join(changes), len(changes))
    fewest = min(counts.values(), default=0)
    return [text for text, count in counts.items() if count == fewest][:MAX_SUGGESTIONS]


def _candidates(setting: MemorySetting, *, batch: int, limit: int) -> Iterator[MemorySetting]:
    """Settings that fit, small changes first."""
    attentions: tuple[Backend, ...] = ("math", "sdpa") if setting.attention == "math" else (setting.attention,)
    for stage in range(setting.sharding.stage, 4):
        sharding = setting.sharding.at_stage(stage)
        for attention in attentions:
            for recompute in RECOMPUTE[RECOMPUTE.index(setting.recompute) :]:
                changed = replace(setting, sharding=sharding, attention=attention, recompute=recompute)
                yield from _smaller_or_wider(changed, batch=batch, limit=limit)


def _smaller_or_wider(setting: MemorySetting, *, batch: int, limit: int) -> Iterator[MemorySetting]:
    """With as many rows or fewer; with as many on more GPUs; with fewer on more GPUs: the first of each that fits."""
    wider = (replace(setting.sharding, ranks=more) for more in range(setting.sharding.ranks + 1, batch + 1))
    on_more = [each for more in wider for each in _micro_batches(replace(setting, sharding=more), batch=batch)]
    same_rows = [each for each in on_more if each.rows == setting.rows]
    for way in (_micro_batches(setting, batch=batch), same_rows, on_more):
        yield from islice((each for each in way if each.rows <= setting.rows and peak(each) <= limit), 1)


def _micro_batches(setting: MemorySetting, *, batch: int) -> list[MemorySetting]:
    """The setting with every micro-batch size in which the ranks can share the batch, largest first."""
    local, left = divmod(batch, setting.sharding.ranks)
    if left:
        return []
    sizes = (rows for rows in range(local, 0, -1) if local % rows == 0)
    return [replace(setting, rows=rows, accumulation=local // rows) for rows in sizes]


def _changes(before: MemorySetting, after: MemorySetting) -> list[str]:
    pairs = {
        "train.micro_batch_size {}": (before.rows, after.rows),
        "train.recompute {}": (before.recompute, after.recompute),
        "model.attention {}": (before.attention, after.attention),
        "ZeRO stage {}": (before.sharding.stage, after.sharding.stage),
        "{} GPUs": (before.sharding.ranks, after.sharding.ranks),
    }
    return [name.format(new) for name, (old, new) in pairs.items() if old != new]
