"""The page of a proof: self-contained HTML, one section per part, whatever the part has found so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from lamda.config.resources import templates
from lamda.proof.parts import PARTS
from lamda.runs.curves import Curve
from lamda.runs.panels import Panel
from lamda.runs.svg_chart import draw_chart

Found = Mapping[str, Any]
Rows = list[list[str]]
WAYS = ("eager", "compiled")
STEP_PARTS = ("forward", "backward", "optimizer", "rest")


@dataclass(frozen=True)
class Section:
    """A part on the page. figures: name and value. tables: header and rows. problems: name and reason."""

    title: str
    status: str
    figures: dict[str, str] = field(default_factory=dict)
    tables: list[tuple[list[str], Rows]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    chart: str = ""

    @property
    def state(self) -> str:
        """The class of its status in the style sheet."""
        is_good = self.status == "done" and not self.problems
        return "finished" if is_good else "running" if self.status == "running" else "failed"


def page(content: dict[str, Any]) -> str:
    """The page of what `proof.json` has."""
    sections = [_section(name, content["parts"][name]) for name in PARTS if name in content["parts"]]
    style = files("lamda.runs").joinpath("static/report.css").read_text("utf-8")
    template = templates("proof/templates", is_html=True).get_template("proof.html.jinja")
    found = {name: part.get("found", {}) for name, part in content["parts"].items()}
    return template.render(
        sections=sections, rehearsal=content["rehearsal"], style=style, headline=dict(_headline(found))
    )


def _headline(found: Mapping[str, Found]) -> Iterator[tuple[str, str]]:
    """The figures that a reader looks for first, of those that are there."""
    if gpu := found.get("environment", {}).get("gpu"):
        yield "GPU", gpu["name"]
    if equality := found.get("equality"):
        yield "attention equal", f"{sum(each['is_equal'] for each in equality.values())} of {len(equality)}"
    if rate := found.get("rate", {}).get("rate"):
        yield "GEMM TFLOP/s", _tera(rate["flops_per_second"])
    for name in ("step-1024", "step-2048"):
        step = found.get(name, {})
        if best := min((step[way] for way in WAYS if way in step), key=lambda way: way["step_seconds"], default=None):
            length = step["setting"]["length"]
            yield f"tokens/s at {length}", f"{best['tokens_per_second']:,.0f}"
            yield f"share of GEMM at {length}", f"{best['share_of_gemm_rate']:.1%}"
            if best["mfu"] is not None:
                yield f"MFU at {length}", f"{best['mfu']:.1%}"
    if stall := found.get("checkpoint", {}).get("stall_seconds"):
        yield "checkpoint stall, s", f"{stall[-1]:.3g}"
    if resume := found.get("resume", {}).get("resume"):
        yield "exact resume", _yes(resume["is_exact"])
    if learning := found.get("learn", {}).get("learning"):
        yield "loss, first and last", f"{learning['curve'][0][1]:.2f}, {learning['curve'][-1][1]:.2f}"


def _section(name: str, part: dict[str, Any]) -> Section:
    found, seconds = part.get("found", {}), part.get("seconds")
    took = "" if seconds is None else f" {seconds:.0f} s"
    left_out: dict[str, list[str]] = {}
    for what, reason in part.get("left_out", {}).items():
        left_out.setdefault(reason, []).append(what)
    show = _SHOWN.get(name.partition("-")[0])
    shown = show(found) if show and found else {}
    return Section(
        title=f"{PARTS[name].title}{took}", status=part["status"], problems=part.get("failed", {}), left_out=left_out,
        **shown,
    )  # fmt: skip


def _environment(found: Found) -> dict[str, Any]:
    rows = [[group, name, _text(value)] for group in found for name, value in _items(found[group])]
    return {"tables": [(["", "", ""], rows)]}


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, dict) else [("", value)]


def _text(value: Any) -> str:
    if isinstance(value, float | int) and abs(value) >= 1e6:
        return f"{value / 1e9:,.2f} G"
    return "none" if value is None else str(value)


def _equality(found: Found) -> dict[str, Any]:
    rows = []
    for name, each in found.items():
        ratios = each["error_to_that_of_math"]
        verdict = "yes" if each["is_equal"] else "NO"
        rows.append([name, verdict, *(f"{ratio:.2f}" for ratio in ratios.values()), _yes(each["same_bits_each_time"])])
    names = next(iter(found.values()))["error_to_that_of_math"]
    equal = sum(each["is_equal"] for each in found.values())
    return {
        "figures": {"within twice the error of math": f"{equal} of {len(found)}"},
        "tables": [(["bf16", "equal", *(f"{name}, error / math's" for name in names), "same bits each time"], rows)],
    }  # fmt: skip


def _yes(is_so: bool) -> str:  # noqa: FBT001 - a cell
    return "yes" if is_so else "no"


def _rate(found: Found) -> dict[str, Any]:
    figures = {"TFLOP/s over time": ", ".join(_tera(each) for each in found["over_time"])}
    rows: Rows = []
    if rate := found.get("rate"):
        figures["TFLOP/s sustained"] = _tera(rate["flops_per_second"])
        figures["data sheet"] = _tera(rate["data_sheet"]) if rate["data_sheet"] else "none for this device"
        rows = [[name, _tera(each)] for name, each in rate["by_product"].items()]
    return {"figures": figures, "tables": [(["product and its gradients", "TFLOP/s"], rows)]}


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"


def _kernels(found: Found) -> dict[str, Any]:
    rows: Rows = []
    for name, each in found.items():
        if "lengths" not in each:
            rows.append([name, "PyTorch's own", *_times(each), ""])
            continue
        for timed in each["lengths"].values():
            for backend, one in timed["backends"].items():
                memory = one["peak_megabytes"]
                rows.append([name, backend, *_times(one), "" if memory is None else f"{memory:,.0f}"])
    return {"tables": [(["length", "backend", "forward ms", "backward ms", "TFLOP/s", "peak MB"], rows)]}


def _times(each: Found) -> list[str]:
    seconds = each["seconds"]
    return [*(f"{seconds[part] * 1e3:.2f}" for part in ("forward", "backward")), f"{each['teraflops_per_second']:.3g}"]


def _step(found: Found) -> dict[str, Any]:
    ways = [way for way in WAYS if way in found]
    lines: dict[str, Callable[[Found], str]] = {
        "step, s": lambda each: f"{each['step_seconds']:.3f}",
        "first step, s": lambda each: f"{each['first_step_seconds']:.1f}",
        "tokens/s": lambda each: f"{each['tokens_per_second']:,.0f}",
        "model TFLOP/s": lambda each: _tera(each["flops_per_second"]),
        "MFU": lambda each: "no data sheet" if each["mfu"] is None else f"{each['mfu']:.1%}",
        "share of the GEMM rate": lambda each: f"{each['share_of_gemm_rate']:.1%}",
        "peak memory, GB": lambda each: f"{each['peak_bytes'] / 1e9:.2f}",
    }
    rows = [[name, *(show(found[way]) for way in ways)] for name, show in lines.items()]
    for part in STEP_PARTS:
        shares = (found[way]["parts"][part] / found[way]["parts"]["whole"] for way in ways)
        rows.append([f"- {part}", *(f"{share:.1%}" for share in shares)])
    tables: list[tuple[list[str], Rows]] = [(["", *ways], rows if ways else [])]
    figures = _setting(found)
    if "waits" in found:
        figures["waits for the device in a step"] = f"{len(found['waits'])}: {', '.join(found['waits'])}".rstrip(": ")
    if kernels := found.get("kernels"):
        figures["busy"] = f"{kernels['busy']:.0%} of the time"
        top = [[each["name"], f"{each['share']:.1%}", f"{each['calls']:g}"] for each in kernels["top"]]
        tables.append((["most time in a step", "share", "calls"], top))
    return {"figures": figures, "tables": tables}


def _setting(found: Found) -> dict[str, str]:
    setting = found.get("setting", {})
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) else value for name, value in setting.items()
    }


def _checkpoint(found: Found) -> dict[str, Any]:
    figures = _setting(found)
    if "bytes" in found:
        figures["size, GB"] = f"{found['bytes'] / 1e9:.3g}"
    if "stall_seconds" in found:
        figures["training stands still, s, first and then"] = _list(found["stall_seconds"])
    if each := found.get("checkpoint"):
        figures["written in the background, s"] = f"{each['write_seconds']:.3g}"
        figures["synced and hashed in the background, s"] = f"{each['sync_and_hash_seconds']:.3g}"
        figures["steps alone, s"] = _list(each["step_seconds_alone"])
        figures["steps beside it, s"] = _list(each["step_seconds_beside"])
    return {"figures": figures}


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")


def _resume(found: Found) -> dict[str, Any]:
    each = found["resume"]
    rows = [[name, "equal" if value is None else f"differs from step {value['step']}"]
            for name, value in each["differences"].items()]  # fmt: skip
    figures = {
        "stopped by a signal": f"in step {each['stopped_in_step']} of {each['steps']}",
        "equal to an uninterrupted run": "yes, bit for bit" if each["is_exact"] else "NO",
    }
    return {"figures": figures, "tables": [(["", "beside the uninterrupted run"], rows)]}


def _learn(found: Found) -> dict[str, Any]:
    figures = _setting(found)
    if not (each := found.get("learning")):
        return {"figures": figures}
    steps, losses = (np.array(column, np.float64) for column in zip(*each["curve"], strict=True))
    figures["training loss"] = f"{losses[0]:.3f} to {losses[-10:].mean():.3f} (mean of the last ten steps)"
    figures["held-out loss"] = ", ".join(f"{loss:.3f} at step {step}" for step, loss in each["evaluations"]) or "none"
    if "tokens_per_second" in each:
        figures["tokens/s"] = f"{each['tokens_per_second']:,.0f}"
    figures["seconds with start and end"] = f"{each['seconds']:.0f}"
    setting = found["setting"]
    tokens = steps * setting["batch"] * setting["length"]
    panel = Panel("Training loss", ("loss",), "nats per token", is_noisy=True)
    chart = draw_chart([Curve("training loss", tokens, losses)], title=panel.title, panel=panel, tokens=tokens[-1])
    return {"figures": figures, "chart": chart}


_SHOWN: dict[str, Callable[[Found], dict[str, Any]]] = {
    "environment": _environment, "equality": _equality, "rate": _rate, "kernels": _kernels, "step": _step,
    "checkpoint": _checkpoint, "resume": _resume, "learn": _learn,
}  # fmt: skip
