"""Charts as inline SVG: axes, a band of all points, a line of means, and the data for the tooltip."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from lamda.runs.curves import Curve, short, smoothed
from lamda.runs.panels import Panel

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 36
"""Room for the labels of the axes."""
BINS = 320
"""Points of a drawn curve."""
FEW = 40
"""Up to this many points each one gets a marker, without averaging."""
COLORS = 8
"""Colors in the style sheet; further curves repeat them, dashed."""


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
    binned = [Bins.of(curve) for curve in curves]
    x_axis, y_axis = Axis(0.0, max(tokens, 1.0), LEFT, WIDTH - RIGHT), _vertical(binned, from_zero=panel.from_zero)
    parts = [_grid(x_axis, y_axis, is_large=panel.is_large)]
    for number, (curve, bins) in enumerate(zip(curves, binned, strict=True)):
        parts.append(_curve(curve, bins, x_axis, y_axis, number, is_noisy=panel.is_noisy))
    data = [
        {"name": curve.run, "x": _rounded(bins.x), "y": _rounded(bins.mean)}
        for curve, bins in zip(curves, binned, strict=True)
    ]
    frame = {"low": x_axis.low, "high": x_axis.high, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH}
    ends = "; ".join(
        f"{curve.run} ends at {_number(bins.mean[-1])}" for curve, bins in zip(curves, binned, strict=True)
    )
    content = escape(json.dumps({"curves": data, **frame}, separators=(",", ":")))
    label = escape(f"{title}, {panel.unit}, over tokens: {ends}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-chart="{content}">'
        f'{"".join(parts)}<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def _vertical(binned: Sequence[Bins], *, from_zero: bool) -> Axis:
    """The vertical axis, with a margin above and below the values."""
    low, high = (np.concatenate([getattr(bins, name) for bins in binned]) for name in ("low", "high"))
    lowest, highest = np.nanmin(low), np.nanmax(high)
    lowest = min(0.0, lowest) if from_zero else lowest
    margin = (highest - lowest) * 0.05 or abs(highest) * 0.1 or 1.0
    return Axis(float(lowest if from_zero else lowest - margin), float(highest + margin), HEIGHT - BOTTOM, TOP)


def _grid(x_axis: Axis, y_axis: Axis, *, is_large: bool) -> str:
    parts = []
    for value in y_axis.ticks(5):
        y = y_axis.position(value)
        label = short(value) if is_large else _number(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in x_axis.ticks(5):
        x = x_axis.position(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>')
    parts.append(
        f'<text class="unit" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">tokens</text>'
    )
    return "".join(parts)


def color_class(number: int) -> str:
    """The CSS classes of a curve."""
    return f"c{number % COLORS}" + (" dashed" if number >= COLORS else "")


def _curve(curve: Curve, bins: Bins, x_axis: Axis, y_axis: Axis, number: int, *, is_noisy: bool) -> str:
    """The band or the points, the line over it, and a cross at the top where a value was not finite."""
    color, few = color_class(number), len(curve.x) <= FEW
    mean = smoothed(bins.mean, max(1, len(bins.mean) // FEW)) if is_noisy and not few else bins.mean
    parts = []
    if len(curve.x) > BINS or (is_noisy and not few):  # the line shows means: show the range of the points too
        parts.append(f'<path class="band {color}" d="{_band(bins, x_axis, y_axis)}"/>')
    parts.append(f'<path class="line {color}" d="{_path(bins.x, mean, x_axis, y_axis)}"/>')
    if few:
        points = [(x, y) for x, y in zip(bins.x, mean, strict=True) if math.isfinite(y)]
        parts += [
            f'<circle class="{color}" cx="{x_axis.position(x):.1f}" cy="{y_axis.position(y):.1f}" r="2.5"/>'
            for x, y in points
        ]
    not_finite = curve.x[~np.isfinite(curve.y)]
    parts += [
        f'<text class="not-finite" x="{x_axis.position(x):.1f}" y="{TOP + 9}" text-anchor="middle">×</text>'
        for x in not_finite[:99]
    ]
    return "".join(parts)


def _path(x: NDArray[np.float64], y: NDArray[np.float64], x_axis: Axis, y_axis: Axis) -> str:
    """A line with gaps where values are not finite."""
    parts, pen = [], "M"
    for place, value in zip(x, y, strict=True):
        if math.isfinite(value):
            parts.append(f"{pen}{x_axis.position(place):.1f} {y_axis.position(value):.1f}")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(parts)


def _band(bins: Bins, x_axis: Axis, y_axis: Axis) -> str:
    """The area between the minima and the maxima."""
    finite = np.isfinite(bins.low)
    x, low, high = bins.x[finite], bins.low[finite], bins.high[finite]
    if not x.size:
        return ""
    corners = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    return (
        "M" + "L".join(f"{x_axis.position(place):.1f} {y_axis.position(value):.1f}" for place, value in corners) + "Z"
    )


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
