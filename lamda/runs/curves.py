"""Curves of runs: the columns of metrics.jsonl over steps, tokens or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import UserError, nearest
from lamda.console import one_line
from lamda.storage.metrics import MetricsReader
from lamda.storage.run_directory import RunDirectory, find_runs

SCALES = {"step": ("step", "step"), "tokens": ("tokens", "tokens"), "time": ("step_seconds", "hours in steps")}
"""Values of `--x`: the column and the label of the axis."""
MAX_FINITE = 1e300
"""Larger numbers count as not finite: the length of an axis over them would overflow."""


@dataclass(frozen=True)
class Curve:
    """A metric of a run by step; y is NaN where it was not finite, empty if the run lacks the column."""

    run: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def read_curves(runs: Sequence[Path], metrics: Sequence[str], *, x: str) -> dict[str, list[Curve]]:
    """The curves of every run, by metric.

    Raises UserError for a folder without a run, and for a metric that no run has.
    """
    read = {path: read_metrics_of(path, {*metrics, SCALES[x][0]}) for path in runs}
    names = dict.fromkeys(name for each in read.values() for name in each.names)
    unknown = [f"--metric {name}: no run has it{nearest(name, names)}" for name in metrics if name not in names]
    if unknown:
        raise UserError("\n".join([*unknown, f"there are: {', '.join(names)}"]))
    labels = labels_of(runs)
    return {metric: [curve_of(labels[path], each, metric, x=x) for path, each in read.items()] for metric in metrics}


def read_metrics_of(path: Path, columns: set[str] | None = None) -> MetricsReader:
    """The rows of a run, with all or the given columns. Raises UserError if there are none."""
    metrics = MetricsReader(RunDirectory(path).metrics, keep=columns)
    metrics.update()
    if not metrics.rows:
        raise UserError(f"{path}: no run with a finished step here{similar_run(path)}")
    return metrics


def similar_run(path: Path) -> str:
    """A hint that names the run beside `path` with the most similar name, or an empty string."""
    return nearest(path.name, (run.name for run in find_runs(path.parent, depth=1)))


def labels_of(runs: Sequence[Path]) -> dict[Path, str]:
    """The names of the runs, or whole paths for runs that share a name."""
    names = [path.resolve().name for path in runs]
    return {
        path: one_line(name if names.count(name) == 1 else str(path)) for path, name in zip(runs, names, strict=True)
    }


def curve_of(run: str, metrics: MetricsReader, metric: str, *, x: str) -> Curve:
    """A column of a run. Raises UserError if it has values that are not numbers."""
    column = SCALES[x][0]
    if column not in metrics.names:
        raise UserError(f"--x {x}: {run} has no column {column}")
    x_values = _numbers([row.get(column) for row in metrics.rows], column)
    if x == "time":
        x_values = np.nancumsum(x_values) / 3600
    is_recorded = np.array([metric in row for row in metrics.rows])
    return Curve(run, x_values[is_recorded], _numbers([row[metric] for row in metrics.rows if metric in row], metric))


def _numbers(values: list[object], name: str) -> NDArray[np.float64]:
    """Numbers, NaN for None. Raises UserError for other values."""
    if not all(value is None or isinstance(value, int | float) for value in values):
        raise UserError(f"--metric {name}: has values that are not numbers")
    try:
        numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    except OverflowError as error:
        raise UserError(f"--metric {name}: has a number too large for a float") from error
    return np.where(np.abs(numbers) < MAX_FINITE, numbers, np.nan)


def smoothed(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The running mean of the last `count` values without those that are not finite; NaN stays NaN."""
    finite = np.isfinite(values)
    sums, counts = (np.cumsum(np.where(finite, each, 0.0)) for each in (values, 1.0))
    sums[count:], counts[count:] = sums[count:] - sums[:-count], counts[count:] - counts[:-count]
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def short(value: float, _position: float | None = None) -> str:
    """An abbreviated number such as `250B`; usable as a Matplotlib tick formatter."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
