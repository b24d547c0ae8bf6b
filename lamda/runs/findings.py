"""All that a report tells of a run, read from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lamda.config.errors import UserError
from lamda.console import NONE, duration, figure, of_total
from lamda.runs.checkpoints import Saved, all_checkpoints, glance, read_config
from lamda.runs.curves import Curve, curve_of, read_metrics_of, short
from lamda.runs.panels import PANELS, SECTIONS, Panel
from lamda.runs.reading import Metrics, Row, Standing, last_lines, read_standing
from lamda.storage.run_directory import RunDirectory

RECENT = 100
"""Steps whose mean stands for now."""
WARNINGS = 30
NAMES = {"skipped_steps": "refused steps"}
"""Columns that a person calls by another name."""


@dataclass(frozen=True)
class Findings:
    """A run as a report shows it.

    config: by `section.key`. config_text: the file. sample: what the model wrote last, if anything, and the file's
    name. warnings: the last lines of train.log that warn.
    """

    label: str
    path: Path
    standing: Standing
    metrics: Metrics
    checkpoints: list[Saved]
    config: dict[str, Any]
    config_text: str
    sample: tuple[str, str] | None
    warnings: list[str]

    @property
    def last(self) -> Row:
        """The newest finished step."""
        return self.metrics.rows[-1]

    @property
    def share(self) -> float | None:
        """How much of the run is done, 0 to 1."""
        return min(1.0, self.last["step"] / self.standing.steps) if self.standing.steps else None

    def figures(self) -> Iterator[tuple[str, str]]:
        """What the run has come to, by name."""
        held_out = next((row for row in reversed(self.metrics.rows) if row.get("eval/loss") is not None), None)
        yield "step", of_total(self.last["step"], self.standing.steps)
        yield "tokens", short_of(self.last.get("tokens"))
        yield "loss", _shown(self._recent("loss"), ".4f")
        evaluated = "eval/full/" if held_out and "eval/full/loss" in held_out else "eval/"
        yield "held-out loss", figure(held_out, f"{evaluated}loss", ".4f")
        if held_out and "eval/bits_per_byte" in held_out:
            yield "bits per byte", figure(held_out, f"{evaluated}bits_per_byte", ".4f")
        yield "tokens/s", short_of(self._recent("tokens_per_second"))
        if (mfu := self._recent("mfu")) is not None:
            yield "MFU", f"{mfu:.1%}"
        yield "time in steps", duration(sum(row.get("step_seconds") or 0.0 for row in self.metrics.rows))
        if self.standing.status == "running" and self.standing.steps:
            left = (self.standing.steps - self.last["step"]) * (self._recent("step_seconds") or 0.0)
            yield "time left", duration(left)
        yield "refused steps", figure(self.last, "skipped_steps", "d")
        yield "rollbacks", figure(self.last, "rollbacks", "d")

    def _recent(self, name: str) -> float | None:
        """The mean over the last steps that have a value."""
        values = [row[name] for row in self.metrics.rows[-RECENT:] if row.get(name) is not None]
        return fmean(values) if values else None


def read_run(path: Path, *, label: str) -> Findings:
    """Read a run, whether it runs or has ended. Raises UserError where no step of one is here."""
    directory = RunDirectory(path)
    standing = read_standing(directory)
    try:
        config, text = read_config(directory.config), directory.config.read_text("utf-8")
    except (UserError, OSError):
        config, text = {}, ""
    samples = sorted(directory.samples.glob("*.txt")) if directory.samples.is_dir() else []
    return Findings(
        label=label,
        path=path,
        standing=standing,
        metrics=read_metrics_of(path),
        checkpoints=[glance(each) for each in all_checkpoints(path)],
        config=config,
        config_text=text,
        sample=(samples[-1].name, samples[-1].read_text("utf-8", "replace")) if samples else None,
        warnings=[line for line in last_lines(directory.log) if " WARNING " in line or " ERROR " in line][-WARNINGS:],
    )


@dataclass(frozen=True)
class Chart:
    """Curves that are drawn together."""

    title: str
    panel: Panel
    curves: list[Curve]


def charts_of(runs: Sequence[Findings]) -> Iterator[tuple[str, str, list[Chart]]]:
    """(title, question, charts) of each section of the catalogue that the runs have something for."""
    for section in SECTIONS:
        charts = [chart for panel in section.panels for chart in _charts(panel, runs)]
        if charts:
            yield section.title, section.question, charts


def _charts(panel: Panel, runs: Sequence[Findings]) -> Iterator[Chart]:
    """One chart of a single run's columns; of several runs one a column, with a curve a run.

    Tasks have a chart a metric in any case: their scales differ.
    """
    names = panel.of(dict.fromkeys(name for run in runs for name in run.metrics.names))
    is_of_tasks = panel.columns == ("eval/*",)
    if len(runs) > 1:
        groups = {_short_name(name): [name] for name in names}
    elif is_of_tasks:
        groups = {}
        for name in names:
            groups.setdefault(name.split("/", 2)[-1], []).append(name)
    else:
        groups = {"": names}
    for group, columns in groups.items():
        curves = [
            curve_of(_label(run, name, runs, task=is_of_tasks), run.metrics, name, x="tokens")
            for name in columns
            for run in runs
            if name in run.metrics.names
        ]
        there = [curve for curve in curves if np.isfinite(curve.y).any()]
        if there:
            is_alone = not group or panel.columns == (columns[0],)
            yield Chart(panel.title if is_alone else f"{panel.title}: {group}", panel, there)


def _label(run: Findings, name: str, runs: Sequence[Findings], *, task: bool) -> str:
    """What tells a curve from the others of its chart."""
    return run.label if len(runs) > 1 else name.split("/")[1] if task else _short_name(name)


def _short_name(name: str) -> str:
    """A column without what its panel says already: `FreeLaw` of `loss/FreeLaw`, `task/acc` of `eval/task/acc`."""
    panel = next((each for each in PANELS if each.of([name])), None)
    below = next((column.removesuffix("*") for column in panel.columns if column.endswith("/*")), "") if panel else ""
    return name.removeprefix(below) if below else NAMES.get(name, name)


def differences(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """Each key of the configuration in which the runs differ, with their values; their folders apart."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    found = [(key, [str(run.config.get(key, NONE)) for run in runs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def short_of(value: float | None) -> str:
    """`1.23M`; `-` where there is none."""
    return NONE if value is None else short(float(f"{value:.3g}"))


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
