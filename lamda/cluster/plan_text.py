"""A plan as text: sections of aligned columns, in units for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from lamda.cluster.memory import PHASES

WIDTH = 100
Row = tuple[str, ...]


def plan_text(planned: dict[str, Any]) -> str:
    """What `lamda.cluster.plan.plan` returns, as `lamda plan` prints it."""
    sections = [
        _section("model", _model(planned)),
        _section("batch", _batch(planned)),
        _section(_memory_title(planned["memory"]), _memory(planned["memory"]), notes=[_verdict(planned["memory"])]),
        _section("with train.recompute", _recompute(planned)),
        _section("at ZeRO stage", _stages(planned["memory"])),
        _section("a rank's communication in a step", _communication(planned)),
        _section("time and cost", _time(planned)),
        _section("data path", _data(planned["data_per_second"])),
        _section("disk", _disk(planned["disk"])),
        _section("checkpoint interval", _interval(planned["checkpoint_interval"], steps=planned["steps"])),
    ]
    warnings = [textwrap.fill(f"! {text}", WIDTH, subsequent_indent="  ") for text in planned["warnings"]]
    return "\n\n".join(sections + warnings)


def _section(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Rows below a title: the first column to the left, figures to the right, and to the left what stands after '|'."""
    tables = [[cell for cell in row if not cell.startswith("|")] for row in rows]
    columns = max(map(len, tables))
    wide = [max((len(row[at]) for row in tables if at < len(row)), default=0) for at in range(columns)]
    lines = [title]
    for row, cells in zip(rows, tables, strict=True):
        padded = [cell.ljust(wide[at]) if at == 0 else cell.rjust(wide[at]) for at, cell in enumerate(cells)]
        said = [cell.removeprefix("|") for cell in row if cell.startswith("|")]
        lines.append(("  " + "  ".join(padded + said)).rstrip())
    return "\n".join(
        [*lines, *(textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="  ") for note in notes)]
    )


def _model(planned: dict[str, Any]) -> list[Row]:
    return [
        ("parameters", f"{planned['parameters']:,}"),
        *((f"  {part}", f"{count:,}") for part, count in planned["parameters_by_part"].items()),
        (
            "training FLOPs a token",
            f"{planned['flops_per_token']:,}",
            "|a multiply-add is 2, causal attention half; recomputation is not counted",
        ),
        ("training FLOPs", f"{planned['flops']:.4g}"),
    ]


def _batch(planned: dict[str, Any]) -> list[Row]:
    return [
        ("ranks", f"{planned['gpus']:,}"),
        ("rows a rank and micro-batch", f"{planned['micro_batch_size']:,}"),
        ("micro-batches a rank and step", f"{planned['gradient_accumulation']:,}", "|gradient accumulation"),
        ("rows a step", f"{planned['global_batch_size']:,}"),
        ("tokens a row", f"{planned['sequence_length']:,}"),
        ("tokens a step", f"{planned['tokens_per_step']:,}"),
        ("steps", f"{planned['steps']:,}"),
        ("tokens", f"{planned['tokens']:,}"),
    ]


def _memory_title(memory: dict[str, Any]) -> str:
    precision = "bf16" if memory["bf16"] else "fp32"
    return (
        f"memory of a rank, GB of 10^9 bytes: ZeRO stage {memory['zero_stage']}, {precision}, {memory['attention']} "
        f"attention, recomputing {memory['recompute']}"
    )


def _memory(memory: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", *PHASES)]
    for item in memory["items"]:
        rows.append((item["name"], *(_gb(item["bytes"]) if phase in item["phases"] else "" for phase in PHASES)))
    return [*rows, ("together", *(_gb(memory["phases"][phase]) for phase in PHASES))]


def _verdict(memory: dict[str, Any]) -> str:
    return (
        f"{'fits' if memory['fits'] else 'DOES NOT FIT'}: {_gb(memory['peak'])} GB of the "
        f"{_gb(memory['usable_bytes'])} GB that can be counted on ({memory['gpu']}: {_gb(memory['gpu_bytes'])} GB less "
        f"{memory['reserve']:.0%}, assumed, for CUDA, NCCL and fragmentation). The host needs "
        f"{_gb(memory['host_bytes_at_start'])} GB per rank at the start, for the model in fp32, and "
        f"{_size(memory['host_bytes_of_rows'])} for rows (data.shuffle)."
    )


def _recompute(planned: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "activations", *_JUDGED, "FLOPs computed")]
    for name, choice in planned["memory"]["by_recompute"].items():
        extra = choice["flops_per_token"] / planned["flops_per_token"] - 1
        rows.append((name, _size(choice["activations"]), *_judged(choice), f"+{extra:.0%}"))
    return rows


def _stages(memory: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("", "model states", *_JUDGED)]
    return rows + [
        (name, _size(choice["model_states"]), *_judged(choice)) for name, choice in memory["by_stage"].items()
    ]


_JUDGED = ("a rank needs", "fits", "largest micro-batch")


def _judged(choice: dict[str, Any]) -> Row:
    rows = choice["largest_micro_batch_size"]
    return (_size(choice["peak"]), "yes" if choice["fits"] else "no", "none" if rows is None else str(rows))


def _communication(planned: dict[str, Any]) -> list[Row]:
    found = planned["communication"]
    if not found:
        return [("none: there is one rank",)]
    rows = [
        (each["kind"], _size(each["tensors"]), _size(each["sent"]), "|at the most" * each["at_most"]) for each in found
    ]
    needed = (
        "over a whole step",
        "",
        f"{_size(planned['sent_bytes_per_second'])}/s",
        "|a rank's rate, were it sent all the step long",
    )
    return [("", "tensors", "sent by a rank in a ring"), *rows, needed]


def _time(planned: dict[str, Any]) -> list[Row]:
    time = planned["time"]
    cost = "give --price, of a GPU-hour" if time["cost"] is None else f"{time['cost']:,.0f}"
    return [
        ("MFU", f"{time['mfu']:.0%}", f"|assumed, of {time['peak_flops_per_gpu'] / 1e12:g} TFLOP/s a GPU; set --mfu"),
        ("tokens a second", f"{time['tokens_per_second']:,.0f}"),
        ("a step", _duration(time["step_seconds"])),
        ("to the end", _duration(time["seconds"])),
        ("GPU-hours", f"{time['gpu_hours']:,.1f}"),
        ("cost", cost, *([f"|at {time['price']:g} a GPU-hour"] if time["price"] is not None else [])),
    ]


def _data(rates: dict[str, Any]) -> list[Row]:
    least, most = (f"{rate:,.0f}" for rate in rates["encoded"])
    lanes = "64 lanes, to 8, of one large compressed file"
    encoded = (least, "all of the text") if least == most else (f"{least} to {most}", lanes)
    return [
        ("a rank trains on", f"{rates['rank']:,.0f}", "tokens/s"),
        ("a rank encodes, at most", encoded[0], "tokens/s", f"|streaming: {encoded[1]}"),
        (
            "all ranks read",
            f"{rates['blocks'] / 1e6:,.3g}",
            "MB/s",
            "|of ready rows (data.cache_dir), and encode nothing",
        ),
    ]


def _disk(disk: dict[str, Any]) -> list[Row]:
    text = disk["text_bytes"]
    blocks = "and some 50 bytes a document" if disk["keeps_blocks"] else "none are kept; data.cache_dir would keep them"
    return [
        ("a checkpoint", _size(disk["checkpoint_bytes"])),
        (f"{disk['checkpoints']} checkpoints at the most", _size(disk["checkpoints_bytes"])),
        ("ready rows", _size(disk["blocks_bytes"]), f"|{blocks}"),
        (
            "training text",
            "not known" if text is None else _size(text),
            "|streamed, not stored" if disk["text_is_streamed"] else "|as stored",
        ),
    ]


def _interval(interval: dict[str, Any], *, steps: int) -> list[Row]:
    def every(name: str, kind: str) -> Row:
        share, count = interval[f"{kind}_lost_share"], interval[f"{kind}_steps"]
        lost = f"|loses {share:.2%} to saving and failures" if share < 1 else "|is less than a save takes"
        told = "|is longer than the run, whose last step has a checkpoint" if count > steps else lost
        return (name, _duration(interval[f"{kind}_seconds"]), f"{count:,} steps", told)

    return [
        ("between failures", _duration(interval["seconds_between_failures"]), _rate(interval)),
        ("a save", _duration(interval["save_seconds"]), "|assumed; set --save-seconds"),
        every("best", "best"),
        every("checkpoint.every", "configured"),
    ]


def _rate(interval: dict[str, Any]) -> str:
    return f"|one in {interval['gpu_hours_a_failure']:,} GPU-hours, as Llama 3's training"


def _size(count: int) -> str:
    return f"{_gb(count)} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _gb(count: int) -> str:
    """Bytes in GB with three figures or more."""
    gigabytes = count / 1e9
    return f"{gigabytes:,.0f}" if gigabytes >= 100 else f"{gigabytes:.1f}" if gigabytes >= 10 else f"{gigabytes:.3g}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"
