"""The evaluation of a dialogue model for a person: a table, and reliability diagrams as text or as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError

WIDTH = 40
"""Characters of a bar from 0 to 1."""
PICTURES = (".png", ".svg", ".pdf")

_HEADS = (
    *(("AUC", 7), ("95% interval", 18), ("accuracy", 10), ("majority", 10)),
    *(("ECE", 8), ("calibrated", 12), ("of 1", 8), ("of 0", 8)),
)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report of `lamda.dialog.evaluation` as lines."""
    loss, perplexity = report["loss"], report["perplexity"]
    if report["tokens"]:
        yield f"responses: {loss:.4f} nats per token, perplexity {perplexity:.2f} ({report['tokens']:,} tokens)"
    else:
        yield "responses: none among these examples"
    if report["attributes"]:
        yield f"{'rating':14}" + "".join(f"{head:>{width}}" for head, width in _HEADS)
    for name, part in report["attributes"].items():
        calibrated = part.get("calibrated")
        error = "-" if calibrated is None else f"{calibrated['calibration_error']:.3f}"
        yield (
            f"{name:14}{_area(part)}{part['accuracy']:10.3f}{part['commoner_class']:10.3f}"
            f"{part['calibration_error']:8.3f}{error:>12}{part['positives']:8,}{part['negatives']:8,}"
        )
        yield from (f"  {baseline:12}{_area(figures)}" for baseline, figures in part.get("baselines", {}).items())
    if report["filter"] is not None:
        yield report["filter"]
    unsafe = report["attributes"].get("unsafe", {}).get("calibrated", {})
    if unsafe.get("false_refusals") is not None and unsafe.get("true_refusals") is not None:
        safe, others = unsafe["false_refusals"], unsafe["true_refusals"]
        above = f"P(unsafe) is above {unsafe['threshold']:.3f}"
        yield f"{above} for {safe:.1%} of the safe responses here and {others:.1%} of the others"


def _area(figures: dict[str, Any]) -> str:
    """AUC and its interval."""
    low, high = figures["auc_interval"]
    area, without = ("-", "only one class") if math.isnan(figures["auc"]) else (f"{figures['auc']:.3f}", "too few")
    interval = without if math.isnan(low) else f"{low:.3f} to {high:.3f}"
    return f"{area:>7}{interval:>18}"


def diagrams(report: dict[str, Any]) -> Iterator[str]:
    """A reliability diagram for each attribute: `=` up to the observed fraction, `|` at the predicted one."""
    for name, part in report["attributes"].items():
        bins = part.get("calibrated", part)["reliability"]
        title = f"{name}, calibrated" if "calibrated" in part else name
        yield f"\n{title:24}{'predicted':>9}{'observed':>9}  0{'1':>{WIDTH}}{'ratings':>9}"
        for number, (count, predicted, observed) in enumerate(bins):
            if count:
                bar = list(f"{'=' * round(observed * WIDTH):{WIDTH + 1}}")
                bar[round(predicted * WIDTH)] = "|"
                edges = f"P {number / len(bins):.1f} to {(number + 1) / len(bins):.1f}"
                yield f"  {edges:22}{predicted:9.3f}{observed:9.3f}  {''.join(bar)}{count:8,}"


def check_picture(file: Path) -> None:
    """Raises UserError if `draw` cannot write such a file."""
    if file.suffix not in PICTURES:
        raise UserError(f"--plot {file}: must end in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); pip install 'lamda-pytorch[plot]'") from error


def draw(report: dict[str, Any], file: Path) -> None:
    """Reliability diagrams of all attributes, before and after calibration, in one picture. Raises UserError."""
    from matplotlib.figure import Figure

    attributes = report["attributes"]
    figure = Figure(figsize=(3 * max(1, len(attributes)), 3.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(attributes)), sharey=True, squeeze=False)[0]
    for panel, (name, part) in zip(panels, attributes.items(), strict=False):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for label, figures, color in (("model", part, "#E69F00"), ("calibrated", part.get("calibrated"), "#0072B2")):
            bins = [each for each in (figures or {"reliability": []})["reliability"] if each[0]]
            area = [4 + 120 * count / (part["positives"] + part["negatives"]) for count, _, _ in bins]
            panel.scatter([b[1] for b in bins], [b[2] for b in bins], s=area, color=color, label=label, alpha=0.8)
        panel.set(title=name, xlabel="predicted", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    panels[0].set_ylabel("observed")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {file}: cannot be written ({error.strerror})") from error
