"""The result of `lamda plan`, and its text: sections of aligned columns, in units for people."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from lamda.cluster.estimates import CheckpointInterval, DataRates, DiskUse
from lamda.cluster.memory import MemoryItem, Phase
from lamda.cluster.zero import Traffic
from lamda.config.resources import templates
from lamda.config.schema import Recompute

WIDTH = 100


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
    host_bytes_offloaded: int
    host_bytes_of_rows: int
    host_bytes_of_snapshot: int


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
class RunStage:
    """A stage of the run: its share of the time, and the memory of a rank in it."""

    name: str
    steps: int
    global_batch_size: int
    sequence_length: int
    tokens: int
    seconds: float
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The output of `lamda plan`, in bytes, seconds and FLOPs; `--json` prints these fields.

    stages: empty without stages. With stages, memory and batch are those of the stage that needs most memory, and
    steps, tokens, FLOPs, time and disk are of all of them together.
    """

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
    stages: list[RunStage]


def plan_text(plan: Plan) -> str:
    """The text that `lamda plan` prints."""
    sections = _TEMPLATES.get_template("plan.txt.jinja").render(plan=plan).strip("\n").split("\n\n")
    warnings = [textwrap.fill(f"! {text}", WIDTH, subsequent_indent="  ") for text in plan.warnings]
    return "\n\n".join([*map(_align, sections), *warnings])


def _align(section: str) -> str:
    """A section of the template as text: names left-aligned, cells right-aligned, notes wrapped."""
    title, *lines = section.splitlines()
    rows = [line.partition(" # ") for line in lines if not line.startswith("> ")]
    tables = [cells.split(" | ") for cells, _, _ in rows]
    columns = max(map(len, tables))
    widths = [max((len(row[at]) for row in tables if at < len(row)), default=0) for at in range(columns)]
    text = [title]
    for (name, *cells), (_, _, comment) in zip(tables, rows, strict=True):
        padded = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), comment]
        text.append(f"  {'  '.join(padded)}".rstrip())
    notes = [line[2:] for line in lines if line.startswith("> ")]
    return "\n".join(text + [textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="  ") for note in notes])


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


_TEMPLATES = templates("cluster/templates")
_TEMPLATES.filters |= {
    "count": "{:,.0f}".format,
    "duration": _duration,
    "gb": _gb,
    "percent": "{:.0%}".format,
    "size": _size,
}
