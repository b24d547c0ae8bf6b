"""`lamda plot`: curves of one or more runs in an image, one panel per metric."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lamda.config.errors import UserError
from lamda.console import one_line
from lamda.runs.curves import SCALES, Curve, read_curves, short, smoothed
from lamda.runs.panels import panel_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's colorblind-safe palette without its yellow, which is too pale on white."""
DASHES = ("-", "--", "-.", ":")
"""Runs differ in dashes too, so that overlapping curves both stay visible."""
MAX_MARKERS = 40
"""Up to this many points, each gets a marker and none is averaged."""
EACH_POINT, NOT_FINITE = "each point", "not finite"
"""Group ids: the raw line behind a mean, and the crosses at the top where a value was NaN or infinite."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda plot`."""
    parser = argparse.ArgumentParser(prog="lamda plot", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("-o", dest="file", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf")
    parser.add_argument(
        "--metric", nargs="+", action="extend", metavar="NAME", help="columns of metrics.jsonl; default: loss"
    )
    parser.add_argument("--x", choices=tuple(SCALES), default="step", help="horizontal axis; default: step")
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axes")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="draw the mean of the last N points as well")
    return parser


def main(argv: list[str]) -> int:
    """`RUN [RUN ...] -o FILE [--metric NAME ...] [--x step|tokens|time] [--log] [--smooth N]`; raises UserError."""
    options = parser().parse_args(argv)
    metrics = list(dict.fromkeys(options.metric or ["loss"]))
    _check(options.file, options.smooth)
    panels = read_curves(options.runs, metrics, x=options.x)
    save(draw(panels, x=options.x, log=options.log, smooth=options.smooth), options.file)
    for metric, curves in panels.items():
        missing = [curve.run for curve in curves if not curve.x.size]
        print(f"{options.file}: {metric}" + (f"; missing in {', '.join(missing)}" if missing else ""))
    return 0


def _check(file: Path, smooth: int) -> None:
    if file.suffix not in SUFFIXES:
        raise UserError(f"-o {file}: must end in {', '.join(SUFFIXES)}")
    if smooth < 1:
        raise UserError(f"--smooth {smooth}: must be at least 1")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"lamda plot needs matplotlib ({error}); pip install 'lamda-pytorch[plot]'") from error


def draw(panels: dict[str, list[Curve]], *, x: str, log: bool, smooth: int) -> Figure:
    """Stacked panels, one per metric; each run has the same color and dashes in all panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 3.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (metric, curves) in zip(axes, panels.items(), strict=True):
        for number, curve in enumerate(curves):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}
            _draw_curve(panel, curve, style, smooth=smooth)
        _style_axes(panel, metric, log=log, smooth=smooth)
    axes[-1].set_xlabel(SCALES[x][1])
    if x == "tokens":
        axes[-1].xaxis.set_major_formatter(short)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write the image in the format of the file's suffix. Raises UserError."""
    from matplotlib import rc_context

    try:
        # The renderer cannot take hundreds of thousands of noisy points as one path.
        with rc_context({"agg.path.chunksize": 10_000}):
            figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"-o {file}: cannot be written ({error.strerror})") from error


def _draw_curve(panel: Axes, curve: Curve, style: dict[str, str], *, smooth: int) -> None:
    from matplotlib.colors import to_rgb

    has_markers = len(curve.x) <= MAX_MARKERS
    color = style["color"]
    if smooth > 1 and not has_markers:
        # Pale rather than transparent: long paths are drawn in chunks, whose ends overlap.
        pale = [1 - 0.35 * (1 - part) for part in to_rgb(color)]
        panel.plot(curve.x, curve.y, color=pale, linewidth=0.8, zorder=1, gid=EACH_POINT)
    values = curve.y if has_markers else smoothed(curve.y, smooth)
    (line,) = panel.plot(curve.x, values, color=color, linewidth=1.5, marker="o" if has_markers else None, markersize=3)
    line.set(linestyle=style["linestyle"], label=_escape(curve.run))
    not_finite = curve.x[~np.isfinite(curve.y)]
    at_top = panel.get_xaxis_transform()
    panel.plot(
        not_finite, np.full(len(not_finite), 0.97), "x", color=color, markersize=5, transform=at_top, gid=NOT_FINITE
    )


def _escape(name: str) -> str:
    """A name escaped for Matplotlib, so that it is neither read as a formula nor hidden."""
    return (" " if name.startswith("_") else "") + one_line(name).replace("$", r"\$")


def _style_axes(panel: Axes, metric: str, *, log: bool, smooth: int) -> None:
    """Label, scale and grid. Raises UserError if a logarithmic axis has no positive value."""
    from matplotlib.ticker import LogLocator, NullFormatter

    known = panel_of(metric)
    panel.set_ylabel(_escape(f"{metric} ({known.unit})" if known else metric))
    is_averaged = any(line.get_gid() == EACH_POINT for line in panel.lines)
    notes = [f"mean of the last {smooth} points; pale: raw values"] if is_averaged else []
    crosses = [line for line in panel.lines if line.get_gid() == NOT_FINITE]
    if any(np.size(line.get_xdata()) for line in crosses):
        notes.append("×: not finite")
    panel.set_title("; ".join(notes), fontsize="small", loc="right")
    if log:
        if not any(np.any(np.asarray(line.get_ydata()) > 0) for line in panel.lines if line not in crosses):
            raise UserError(f"--log: {metric} has no value above 0")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    if log or (known and known.is_large):
        panel.yaxis.set_major_formatter(short)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
