"""Charts as inline SVG: axes, a band of all points, a line of means, and the values for a pointer to find."""

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
"""Places along the axis at which a curve is drawn."""
FEW = 40
"""Points up to which each one gets a mark, and none is averaged with others."""
COLOURS = 8
"""Colours in the style sheet; further curves have them again, dashed."""


@dataclass(frozen=True)
class Bins:
    """A curve at BINS places at the most: mean, least and greatest value in each, NaN where none is finite."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, curve: Curve) -> Bins:
        """Neighbouring points together, as many in each bin."""
        parts = np.array_split(np.arange(len(curve.x)), min(BINS, max(1, len(curve.x))))
        finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
        rows = [(curve.x[part][-1], *_of_part(finite[part])) for part in parts if len(part)]
        columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
        return cls(*columns)


def _of_part(values: NDArray[np.float64]) -> tuple[float, float, float]:
    there = values[~np.isnan(values)]
    return (there.mean(), there.min(), there.max()) if there.size else (math.nan,) * 3


@dataclass(frozen=True)
class Axis:
    """A scale from values to places, with round marks."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self, count: int) -> list[float]:
        """About `count` round values: 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / count
        if rough <= 0:
            return []
        size = 10.0 ** math.floor(math.log10(rough))
        apart = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        first = math.ceil(self.low / apart - 1e-9)
        return [number * apart for number in range(first, math.floor(self.high / apart + 1e-9) + 1)]


def chart(curves: Sequence[Curve], *, title: str, panel: Panel, tokens: float) -> str:
    """An SVG of curves over tokens, from 0 to `tokens`."""
    binned = [Bins.of(curve) for curve in curves]
    across, up = Axis(0.0, max(tokens, 1.0), LEFT, WIDTH - RIGHT), _upwards(binned, from_zero=panel.from_zero)
    parts = [_grid(across, up, is_large=panel.is_large)]
    for number, (curve, bins) in enumerate(zip(curves, binned, strict=True)):
        parts.append(_curve(curve, bins, across, up, number, is_noisy=panel.is_noisy))
    data = [
        {"name": curve.run, "x": _rounded(bins.x), "y": _rounded(bins.mean)}
        for curve, bins in zip(curves, binned, strict=True)
    ]
    frame = {"low": across.low, "high": across.high, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH}
    told = "; ".join(
        f"{curve.run} ends at {_number(bins.mean[-1])}" for curve, bins in zip(curves, binned, strict=True)
    )
    content = escape(json.dumps({"curves": data, **frame}, separators=(",", ":")))
    label = escape(f"{title}, {panel.unit}, over tokens: {told}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-chart="{content}">'
        f'{"".join(parts)}<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def _upwards(binned: Sequence[Bins], *, from_zero: bool) -> Axis:
    """The vertical axis, with room above and below the values."""
    low, high = (np.concatenate([getattr(bins, name) for bins in binned]) for name in ("low", "high"))
    least, most = np.nanmin(low), np.nanmax(high)
    least = min(0.0, least) if from_zero else least
    room = (most - least) * 0.05 or abs(most) * 0.1 or 1.0
    return Axis(float(least if from_zero else least - room), float(most + room), HEIGHT - BOTTOM, TOP)


def _grid(across: Axis, up: Axis, *, is_large: bool) -> str:
    parts = []
    for value in up.marks(5):
        y = up.place(value)
        label = short(value) if is_large else _number(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in across.marks(5):
        parts.append(
            f'<text x="{across.place(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'
        )
    parts.append(
        f'<text class="unit" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">tokens</text>'
    )
    return "".join(parts)


def _curve(curve: Curve, bins: Bins, across: Axis, up: Axis, number: int, *, is_noisy: bool) -> str:
    """The band (or the points) behind, the line over it, and a cross at the top where a value was not finite."""
    colour = f"c{number % COLOURS}" + (" dashed" if number >= COLOURS else "")
    few = len(curve.x) <= FEW
    mean = smoothed(bins.mean, max(1, len(bins.mean) // FEW)) if is_noisy and not few else bins.mean
    parts = []
    if len(curve.x) > BINS or (is_noisy and not few):  # where means stand for points, these are shown as well
        parts.append(f'<path class="band {colour}" d="{_band(bins, across, up)}"/>')
    parts.append(f'<path class="line {colour}" d="{_path(bins.x, mean, across, up)}"/>')
    if few:
        there = [(x, y) for x, y in zip(bins.x, mean, strict=True) if math.isfinite(y)]
        parts += [
            f'<circle class="{colour}" cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="2.5"/>' for x, y in there
        ]
    refused = curve.x[~np.isfinite(curve.y)]
    parts += [
        f'<text class="refused" x="{across.place(x):.1f}" y="{TOP + 9}" text-anchor="middle">×</text>'
        for x in refused[:99]
    ]
    return "".join(parts)


def _path(x: NDArray[np.float64], y: NDArray[np.float64], across: Axis, up: Axis) -> str:
    """A line with a gap wherever a value is not finite."""
    parts, pen = [], "M"
    for place, value in zip(x, y, strict=True):
        if math.isfinite(value):
            parts.append(f"{pen}{across.place(place):.1f} {up.place(value):.1f}")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(parts)


def _band(bins: Bins, across: Axis, up: Axis) -> str:
    """The area between the least and the greatest values."""
    there = np.isfinite(bins.low)
    x, low, high = bins.x[there], bins.low[there], bins.high[there]
    if not x.size:
        return ""
    corners = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
    return "M" + "L".join(f"{across.place(place):.1f} {up.place(value):.1f}" for place, value in corners) + "Z"


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
