"""A curve in braille characters, two dots wide and four high each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""A braille character's bit of each of its dots, from the top."""
CLIPPED = 0.05
"""Share of the highest values that may lie above the picture: a run's first losses would flatten all others."""


def draw(values: NDArray[np.float64], *, width: int, height: int) -> tuple[list[str], float, float]:
    """Lines of a curve through `values` in order, and the values at its lower and upper edge.

    A column of dots spans the least to the greatest of the values that fall on it; what lies above the
    picture is drawn at its upper edge. NaN leaves a gap. Without a finite value all is empty.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [" " * width] * height, np.nan, np.nan
    low, high = float(finite.min()), float(np.quantile(finite, 1 - CLIPPED))
    dots = np.zeros((height * 4, width * 2), dtype=bool)
    scale = (height * 4 - 1) / (high - low) if high > low else 0.0
    levels = np.clip((values - low) * scale, 0, height * 4 - 1)
    before: tuple[float, float] | None = None
    for column, part in enumerate(_columns(levels, width * 2)):
        if np.isnan(part).all():
            before = None
            continue
        bottom, top = float(np.nanmin(part)), float(np.nanmax(part))
        # Reach to the column before, so that a steep curve has no holes.
        first, last = (bottom, top) if before is None else (min(bottom, before[1]), max(top, before[0]))
        dots[round(first) : round(last) + 1, column] = True
        before = bottom, top
    cells = dots[::-1].reshape(height, 4, width, 2)
    codes = 0x2800 + np.einsum("hdwc,dc->hw", cells.astype(int), _DOTS)
    return ["".join(map(chr, line)) for line in codes], low, high


def _columns(levels: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """The values of each column; between few values the line is straight."""
    if len(levels) >= count:
        return np.array_split(levels, count)
    places = np.linspace(0, len(levels) - 1, count)
    left = np.floor(places).astype(int)
    right = np.ceil(places).astype(int)
    return list((levels[left] + (levels[right] - levels[left]) * (places - left))[:, None])
