"""The result of `lamda plan`, and its text: sections of aligned columns, in units for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from lamda.cluster.estimates import CheckpointInterval, DataRates, DiskUse
from lamda.cluster.memory import PHASES, MemoryItem, Phase, Recompute
from lamda.cluster.zero import Traffic

WIDTH = 100
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """A rank's memory in bytes. largest_micro_batch_size: None if none fits."""

    peak: int
    fits: bool
    largest_micro_batch_size: int | None


@dataclass(frozen=True)
class RecomputePlan(Fit):
    """With one kind of recomputation."""

    activations: int
    flops_per_token: int


@dataclass(frozen=True)
class StagePlan(Fit):
    """At one ZeRO stage."""

    model_states: int


@dataclass(frozen=True)
class MemoryPlan(Fit):
    """With the configured settings: items, and alternatives."""

    gpu: str
    gpu_bytes: int
    usable_bytes: int
    reserve: float
    zero_stage: int
    bf16: bool
    attention: str
    recompute: str
    items: list[MemoryItem]
    phases: dict[Phase, int]
    by_recompute: dict[Recompute, RecomputePlan]
    by_stage: dict[str, StagePlan]
    host_bytes_at_start: int
    host_bytes_of_rows: int


@dataclass(frozen=True)
class TimePlan:
    """Time to the end of the run, without failures and saves."""

    mfu: float
    peak_flops_per_gpu: float
    tokens_per_second: float
    step_seconds: float
    seconds: float
    gpu_hours: float
    price: float | None
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """The output of `lamda plan`, in bytes, seconds and FLOPs; `--json` prints these fields."""

    parameters: int
    parameters_by_part: dict[str, int]
    gpus: int
    micro_batch_size: int
    gradient_accumulation: int
    global_batch_size: int
    sequence_length: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops_per_token: int
    flops: int
    memory: MemoryPlan
    communication: list[Traffic]
    sent_bytes_per_second: float
    time: TimePlan
    data_per_second: DataRates
    disk: DiskUse
    checkpoint_interval: CheckpointInterval
    warnings: list[str]


def plan_text(plan: Plan) -> str:
    """The text that `lamda plan` prints."""
    sections = [
        _section("model", _model(plan)),
        _section("batch", _batch(plan)),
        _section(_memory_title(plan.memory), _memory(plan.memory), notes=[_verdict(plan.memory)]),
        _section("with train.recompute", _recompute(plan)),
        _section("at ZeRO stage", _stages(plan.memory)),
        _section("a rank's communication in a step", _communication(plan)),
        _section("time and cost", _time(plan)),
        _section("data path", _data(plan.data_per_second)),
        _section("disk", _disk(plan.disk)),
        _section("checkpoint interval", _interval(plan.checkpoint_interval, steps=plan.steps)),
    ]
    warnings = [textwrap.fill(f"! {text}", WIDTH, subsequent_indent="  ") for text in plan.warnings]
    return "\n\n".join(sections + warnings)


def _section(title: str, rows: Sequence[Cells], notes: Sequence[str] = ()) -> str:
    """A titled table: the first column and cells that begin with '|' left-aligned, the other cells right-aligned."""
    tables = [[cell for cell in row if not cell.startswith("|")] for row in rows]
    columns = max(map(len, tables))
    widths = [max((len(row[at]) for row in tables if at < len(row)), default=0) for at in range(columns)]
    lines = [title]
    for row, cells in zip(rows, tables, strict=True):
        padded = [cell.ljust(widths[at]) if at == 0 else cell.rjust(widths[at]) for at, cell in enumerate(cells)]
        comments = [cell.removeprefix("|") for cell in row if cell.startswith("|")]
        lines.append(("  " + "  ".join(padded + comments)).rstrip())
    return "\n".join(
        [*lines, *(textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="  ") for note in notes)]
    )


def _model(plan: Plan) -> list[Cells]:
    counted = "|a multiply-add is 2, causal attention half; recomputation is not counted"
    return [
        ("parameters", f"{plan.parameters:,}"),
        *((f"  {part}", f"{count:,}") for part, count in plan.parameters_by_part.items()),
        ("training FLOPs per token", f"{plan.flops_per_token:,}", counted),
        ("training FLOPs", f"{plan.flops:.4g}"),
    ]


def _batch(plan: Plan) -> list[Cells]:
    return [
        ("ranks", f"{plan.gpus:,}"),
        ("rows per rank and micro-batch", f"{plan.micro_batch_size:,}"),
        ("micro-batches per rank and step", f"{plan.gradient_accumulation:,}", "|gradient accumulation"),
        ("rows per step", f"{plan.global_batch_size:,}"),
        ("tokens per row", f"{plan.sequence_length:,}"),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}"),
    ]


def _memory_title(memory: MemoryPlan) -> str:
    return (
        f"memory of a rank, GB of 10^9 bytes: ZeRO stage {memory.zero_stage}, {'bf16' if memory.bf16 else 'fp32'}, "
        f"{memory.attention} attention, recomputing {memory.recompute}"
    )


def _memory(memory: MemoryPlan) -> list[Cells]:
    rows: list[Cells] = [("", *PHASES)]
    for item in memory.items:
        rows.append((item.name, *(_gb(item.bytes) if phase in item.phases else "" for phase in PHASES)))
    return [*rows, ("together", *(_gb(memory.phases[phase]) for phase in PHASES))]


def _verdict(memory: MemoryPlan) -> str:
    return (
        f"{'fits' if memory.fits else 'DOES NOT FIT'}: {_gb(memory.peak)} GB of the "
        f"{_gb(memory.usable_bytes)} GB that can be counted on ({memory.gpu}: {_gb(memory.gpu_bytes)} GB less "
        f"{memory.reserve:.0%}, assumed, for CUDA, NCCL and fragmentation). The host needs "
        f"{_gb(memory.host_bytes_at_start)} GB per rank at the start, for the model in fp32, and "
        f"{_size(memory.host_bytes_of_rows)} for rows (data.shuffle)."
    )


def _recompute(plan: Plan) -> list[Cells]:
    rows: list[Cells] = [("", "activations", *_JUDGED, "FLOPs computed")]
    for name, choice in plan.memory.by_recompute.items():
        extra = choice.flops_per_token / plan.flops_per_token - 1
        rows.append((name, _size(choice.activations), *_judged(choice), f"+{extra:.0%}"))
    return rows


def _stages(memory: MemoryPlan) -> list[Cells]:
    rows: list[Cells] = [("", "model states", *_JUDGED)]
    return rows + [(name, _size(choice.model_states), *_judged(choice)) for name, choice in memory.by_stage.items()]


_JUDGED = ("a rank needs", "fits", "largest micro-batch")


def _judged(choice: Fit) -> Cells:
    rows = choice.largest_micro_batch_size
    return (_size(choice.peak), "yes" if choice.fits else "no", "none" if rows is None else str(rows))


def _communication(plan: Plan) -> list[Cells]:
    found = plan.communication
    if not found:
        return [("none: there is one rank",)]
    rows = [(each.kind, _size(each.tensors), _size(each.sent), "|at the most" * each.at_most) for each in found]
    rate = f"{_size(plan.sent_bytes_per_second)}/s"
    total = ("over a whole step", "", rate, "|a rank's rate, were it sent all the step long")
    return [("", "tensors", "sent by a rank in a ring"), *rows, total]


def _time(plan: Plan) -> list[Cells]:
    time = plan.time
    cost = "give --price, of a GPU-hour" if time.cost is None else f"{time.cost:,.0f}"
    return [
        ("MFU", f"{time.mfu:.0%}", f"|assumed, of {time.peak_flops_per_gpu / 1e12:g} TFLOP/s a GPU; set --mfu"),
        ("tokens a second", f"{time.tokens_per_second:,.0f}"),
        ("a step", _duration(time.step_seconds)),
        ("to the end", _duration(time.seconds)),
        ("GPU-hours", f"{time.gpu_hours:,.1f}"),
        ("cost", cost, *([f"|at {time.price:g} a GPU-hour"] if time.price is not None else [])),
    ]


def _data(rates: DataRates) -> list[Cells]:
    least, most = (f"{rate:,.0f}" for rate in rates.encoded)
    lanes = "64 lanes, to 8, of one large compressed file"
    encoded = (least, "all of the text") if least == most else (f"{least} to {most}", lanes)
    return [
        ("a rank trains on", f"{rates.rank:,.0f}", "tokens/s"),
        ("a rank encodes, at most", encoded[0], "tokens/s", f"|streaming: {encoded[1]}"),
        ("all ranks read", f"{rates.blocks / 1e6:,.3g}", "MB/s", "|of ready rows (data.cache_dir), and encode nothing"),
    ]


def _disk(disk: DiskUse) -> list[Cells]:
    text = disk.text_bytes
    blocks = "and some 50 bytes a document" if disk.keeps_blocks else "none are kept; data.cache_dir would keep them"
    return [
        ("a checkpoint", _size(disk.checkpoint_bytes)),
        (f"{disk.checkpoints} checkpoints at the most", _size(disk.checkpoints_bytes)),
        ("ready rows", _size(disk.blocks_bytes), f"|{blocks}"),
        (
            "training text",
            "not known" if text is None else _size(text),
            "|streamed, not stored" if disk.text_is_streamed else "|as stored",
        ),
    ]


def _interval(interval: CheckpointInterval, *, steps: int) -> list[Cells]:
    def every(name: str, seconds: float, count: int, share: float) -> Cells:
        lost = f"|loses {share:.2%} to saving and failures" if share < 1 else "|is less than a save takes"
        comment = "|is longer than the run, whose last step has a checkpoint" if count > steps else lost
        return (name, _duration(seconds), f"{count:,} steps", comment)

    return [
        (
            "between failures",
            _duration(interval.seconds_between_failures),
            f"|one in {interval.gpu_hours_a_failure:,} GPU-hours, as Llama 3's training",
        ),
        ("a save", _duration(interval.save_seconds), "|assumed; set --save-seconds"),
        every("best", interval.best_seconds, interval.best_steps, interval.best_lost_share),
        every(
            "checkpoint.every", interval.configured_seconds, interval.configured_steps, interval.configured_lost_share
        ),
    ]


def _size(count: float) -> str:
    return f"{_gb(count)} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _gb(count: float) -> str:
    """Bytes in GB, to at least three digits."""
    gigabytes = count / 1e9
    return f"{gigabytes:,.0f}" if gigabytes >= 100 else f"{gigabytes:.1f}" if gigabytes >= 10 else f"{gigabytes:.3g}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"
