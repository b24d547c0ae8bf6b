"""Charts as inline SVG: axes, a band of all points, a line of means, and the data for the tooltip."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamda.config.resources import templates
from lamda.runs.curves import Curve, short, smoothed
from lamda.runs.panels import Panel

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 10, 8, HEIGHT - 36
"""Edges of the plot, with room for the labels of the axes."""
BINS = 320
"""Points of a drawn curve."""
MAX_MARKERS = 40
"""Up to this many points, each gets a marker and none is averaged."""
COLORS = 8
"""Colors in the style sheet; further curves repeat them, dashed."""

TEMPLATES = templates("runs/static", is_html=True)
TEMPLATES.filters["place"] = "{:.1f}".format


@dataclass(frozen=True)
class Bins:
    """A curve reduced to at most BINS bins: mean, minimum and maximum of each, NaN if no value is finite."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, curve: Curve) -> Bins:
        """Bins of equal numbers of neighboring points."""
        parts = np.array_split(np.arange(len(curve.x)), min(BINS, max(1, len(curve.x))))
        finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
        rows = [(curve.x[part][-1], *_summary(finite[part])) for part in parts if len(part)]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
        return cls(*columns)


def _summary(values: NDArray[np.float64]) -> tuple[float, float, float]:
    finite = values[~np.isnan(values)]
    return (finite.mean(), finite.min(), finite.max()) if finite.size else (math.nan,) * 3


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to coordinates, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def position(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values: 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / count
        if rough <= 0:
            return []
        size = 10.0 ** math.floor(math.log10(rough))
        apart = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        first = math.ceil(self.low / apart - 1e-9)
        return [number * apart for number in range(first, math.floor(self.high / apart + 1e-9) + 1)]


def draw_chart(curves: Sequence[Curve], *, title: str, panel: Panel, tokens: float) -> str:
    """An SVG of curves over tokens, from 0 to `tokens`."""
    pairs = [(curve, Bins.of(curve)) for curve in curves]
    x_axis = Axis(0.0, max(tokens, 1.0), LEFT, RIGHT)
    y_axis = _vertical([bins for _, bins in pairs], from_zero=panel.from_zero)
    y_label = short if panel.is_large else _number
    ends = "; ".join(f"{curve.run} ends at {_number(bins.mean[-1])}" for curve, bins in pairs)
    named = [{"name": curve.run, "x": _rounded(bins.x), "y": _rounded(bins.mean)} for curve, bins in pairs]
    frame = {"low": x_axis.low, "high": x_axis.high, "left": LEFT, "right": RIGHT, "width": WIDTH}
    return TEMPLATES.get_template("chart.svg.jinja").render(
        **frame,
        height=HEIGHT,
        top=TOP,
        bottom=BOTTOM,
        label=f"{title}, {panel.unit}, over tokens: {ends}",
        data=json.dumps({"curves": named, **frame}, separators=(",", ":")),
        x_ticks=[(x_axis.position(value), short(value)) for value in x_axis.ticks(5)],
        y_ticks=[(y_axis.position(value), y_label(value)) for value in y_axis.ticks(5)],
        curves=[
            {"color": color_class(number), **_shapes(curve, bins, x_axis, y_axis, is_noisy=panel.is_noisy)}
            for number, (curve, bins) in enumerate(pairs)
        ],
    )


def _vertical(binned: Sequence[Bins], *, from_zero: bool) -> Axis:
    """The vertical axis, with a margin above and below the values."""
    low, high = (np.concatenate([getattr(bins, name) for bins in binned]) for name in ("low", "high"))
    lowest, highest = np.nanmin(low), np.nanmax(high)
    lowest = min(0.0, lowest) if from_zero else lowest
    margin = (highest - lowest) * 0.05 or abs(highest) * 0.1 or 1.0
    return Axis(float(lowest if from_zero else lowest - margin), float(highest + margin), BOTTOM, TOP)


def color_class(number: int) -> str:
    """The CSS classes of a curve."""
    return f"c{number % COLORS}" + (" dashed" if number >= COLORS else "")


def _shapes(curve: Curve, bins: Bins, x_axis: Axis, y_axis: Axis, *, is_noisy: bool) -> dict[str, object]:
    """The band or the points, the line over it, and the crosses at the top where a value was not finite."""
    has_markers = len(curve.x) <= MAX_MARKERS
    mean = smoothed(bins.mean, max(1, len(bins.mean) // MAX_MARKERS)) if is_noisy and not has_markers else bins.mean
    shows_means = len(curve.x) > BINS or (is_noisy and not has_markers)
    points = [(x_axis.position(x), y_axis.position(y)) for x, y in zip(bins.x, mean, strict=True)]
    return {
        "band": _band(bins, x_axis, y_axis) if shows_means else "",
        "line": _path(points),
        "points": [point for point in points if has_markers and math.isfinite(point[1])],
        "crosses": [x_axis.position(x) for x in curve.x[~np.isfinite(curve.y)][:99]],
    }


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A line with gaps where values are not finite."""
    parts, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(parts)


def _band(bins: Bins, x_axis: Axis, y_axis: Axis) -> str:
    """The area between the minima and the maxima."""
    finite = np.isfinite(bins.low)
    x, low, high = bins.x[finite], bins.low[finite], bins.high[finite]
    corners = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    return f"{_path([(x_axis.position(x), y_axis.position(y)) for x, y in corners])}Z" if corners else ""


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
