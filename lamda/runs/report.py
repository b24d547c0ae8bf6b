"""`lamda report`: one or more runs as one self-contained HTML page that loads nothing from a network."""

from __future__ import annotations

import argparse
import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lamda import __version__
from lamda.config.errors import UserError
from lamda.console import NONE, duration, figure, of_total, one_line
from lamda.runs.checkpoints import CheckpointInfo, all_checkpoints, inspect_checkpoint, read_config
from lamda.runs.curves import Curve, curve_of, labels_of, read_metrics_of, short
from lamda.runs.panels import GROUPS, Panel, panel_of
from lamda.runs.svg_chart import TEMPLATES, color_class, draw_chart
from lamda.storage.metrics import Metrics, MetricsReader, last_lines
from lamda.storage.run_directory import RunDirectory, RunStatus, read_run_status

SUFFIXES = (".html", ".htm")
RECENT_STEPS = 100
"""Steps averaged for the current figures."""
MAX_WARNINGS = 30
DISPLAY_NAMES = {"skipped_steps": "skipped steps"}
"""Display names of columns."""
DIVIDER = "⟫"
"""Separates the prompt of a sample from the generated text."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda report`."""
    parser = argparse.ArgumentParser(prog="lamda report", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-o", dest="file", type=Path, required=True, metavar="FILE", help="a self-contained .html page to send or keep"
    )
    return parser


def main(argv: list[str]) -> int:
    """`RUN [RUN ...] -o FILE`; raises UserError."""
    options = parser().parse_args(argv)
    if options.file.suffix not in SUFFIXES:
        raise UserError(f"-o {options.file}: a report is a {' or '.join(SUFFIXES)} file")
    labels = labels_of(list(dict.fromkeys(options.runs)))  # a run named twice appears once
    text = page([read_run(path, label=label) for path, label in labels.items()])
    try:
        options.file.write_text(text, "utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"-o {options.file}: cannot be written ({error.strerror})") from error
    runs = ", ".join(one_line(str(run)) for run in options.runs)
    print(f"{options.file}: {runs}; {len(text) / 1000:.0f} kB, opens in any browser")
    return 0


@dataclass(frozen=True)
class RunReport:
    """The contents of a run's report.

    config: by `section.key`. config_text: config.yaml. sample: file name and text of the newest sample, if any.
    warnings: the last warnings and errors in train.log.
    """

    label: str
    path: Path
    status: RunStatus
    metrics: MetricsReader
    checkpoints: list[CheckpointInfo]
    config: dict[str, Any]
    config_text: str
    sample: tuple[str, str] | None
    warnings: list[str]

    @property
    def last(self) -> Metrics:
        """The newest finished step."""
        return self.metrics.rows[-1]

    @property
    def progress(self) -> float | None:
        """The completed fraction of the run, 0 to 1."""
        return min(1.0, self.last["step"] / self.status.steps) if self.status.steps else None

    def figures(self) -> Iterator[tuple[str, str]]:
        """Key figures by name."""
        held_out = next((row for row in reversed(self.metrics.rows) if row.get("eval/loss") is not None), None)
        yield "step", of_total(self.last["step"], self.status.steps)
        yield "tokens", short_of(self.last.get("tokens"))
        yield "loss", NONE if (loss := self._recent("loss")) is None else f"{loss:.4f}"
        evaluated = "eval/full/" if held_out and "eval/full/loss" in held_out else "eval/"
        yield "held-out loss", figure(held_out, f"{evaluated}loss", ".4f")
        if held_out and "eval/bits_per_byte" in held_out:
            yield "bits per byte", figure(held_out, f"{evaluated}bits_per_byte", ".4f")
        yield "tokens/s", short_of(self._recent("tokens_per_second"))
        if (mfu := self._recent("mfu")) is not None:
            yield "MFU", f"{mfu:.1%}"
        yield "time in steps", duration(sum(row.get("step_seconds") or 0.0 for row in self.metrics.rows))
        if self.status.state == "running" and self.status.steps:
            left = (self.status.steps - self.last["step"]) * (self._recent("step_seconds") or 0.0)
            yield "time left", duration(left)
        yield "skipped steps", figure(self.last, "skipped_steps", "d")
        yield "rollbacks", figure(self.last, "rollbacks", "d")

    def _recent(self, name: str) -> float | None:
        """The mean over the recent steps that have a value."""
        values = [row[name] for row in self.metrics.rows[-RECENT_STEPS:] if row.get(name) is not None]
        return fmean(values) if values else None


def read_run(path: Path, *, label: str) -> RunReport:
    """Read a running or finished run. Raises UserError if it has no finished step."""
    directory = RunDirectory(path)
    try:
        config, text = read_config(directory.config), directory.config.read_text("utf-8")
    except (UserError, OSError):
        config, text = {}, ""
    warnings = [line for line in last_lines(directory.log) if " WARNING " in line or " ERROR " in line]
    samples = sorted(directory.samples.glob("*.txt")) if directory.samples.is_dir() else []
    return RunReport(
        label=label,
        path=path,
        status=read_run_status(directory),
        metrics=read_metrics_of(path),
        checkpoints=[inspect_checkpoint(each) for each in all_checkpoints(path)],
        config=config,
        config_text=text,
        sample=(samples[-1].name, samples[-1].read_text("utf-8", "replace")) if samples else None,
        warnings=warnings[-MAX_WARNINGS:],
    )


@dataclass(frozen=True)
class Chart:
    """Curves that share one chart."""

    title: str
    panel: Panel
    curves: list[Curve]


def charts_of(runs: Sequence[RunReport]) -> Iterator[tuple[str, str, list[Chart]]]:
    """(title, question, charts) of each panel group for which the runs have data."""
    for group in GROUPS:
        charts = [chart for panel in group.panels for chart in _charts(panel, runs)]
        if charts:
            yield group.title, group.question, charts


def _charts(panel: Panel, runs: Sequence[RunReport]) -> Iterator[Chart]:
    """For a single run one chart of all columns; for several runs one chart per column, with one curve per run.

    Tasks always have one chart per metric: their scales differ.
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
        drawable = [curve for curve in curves if np.isfinite(curve.y).any()]
        if drawable:
            is_alone = not group or panel.columns == (columns[0],)
            yield Chart(panel.title if is_alone else f"{panel.title}: {group}", panel, drawable)


def _label(run: RunReport, name: str, runs: Sequence[RunReport], *, task: bool) -> str:
    """What distinguishes a curve within its chart."""
    return run.label if len(runs) > 1 else name.split("/")[1] if task else _short_name(name)


def _short_name(name: str) -> str:
    """A column without the prefix of its panel: `FreeLaw` for `loss/FreeLaw`, `task/acc` for `eval/task/acc`."""
    panel = panel_of(name)
    below = next((column.removesuffix("*") for column in panel.columns if column.endswith("/*")), "") if panel else ""
    return name.removeprefix(below) if below else DISPLAY_NAMES.get(name, name)


def differences(runs: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Each configuration key that differs between the runs, with the values; `run.dir` is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    found = [(key, [str(run.config.get(key, NONE)) for run in runs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def short_of(value: float | None) -> str:
    """`1.23M`; `-` for None."""
    return NONE if value is None else short(float(f"{value:.3g}"))


def page(runs: Sequence[RunReport]) -> str:
    """The HTML page of one run, or of several side by side."""
    static = files("lamda.runs").joinpath("static")
    style, script = (static.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
    figures, tokens = [dict(run.figures()) for run in runs], max(run.last["tokens"] for run in runs)
    return TEMPLATES.get_template("report.html.jinja").render(
        style=style,
        script=script,
        hash=source_hash,
        runs=runs,
        figures=figures,
        columns=dict.fromkeys(name for each in figures for name in each),
        differences=[(key, *values) for key, values in differences(runs)],
        groups=charts_of(runs),
        color=color_class,
        draw=lambda chart: draw_chart(chart.curves, title=chart.title, panel=chart.panel, tokens=tokens),
        divider=DIVIDER,
        dash=NONE,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def source_hash(text: str) -> str:
    """The source of a style or script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
