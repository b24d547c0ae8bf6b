"""A report's HTML: everything inside it, nothing fetched, and no text of a run taken for markup."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from lamda import __version__
from lamda.console import NONE, duration, size_of
from lamda.runs.checkpoints import Saved
from lamda.runs.findings import Chart, Findings, charts_of, differences
from lamda.runs.svg_chart import COLOURS, chart

DIVIDER = "⟫"
"""Stands in a sample between what was given and what the model wrote."""


def page(runs: Sequence[Findings]) -> str:
    """The page of one run, or of several side by side."""
    static = files("lamda.runs").joinpath("static")
    style, script = (static.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
    tokens = max(run.last["tokens"] for run in runs)
    # Nothing may be fetched, and no style or script runs but these two, whatever a run's files hold.
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    title = ", ".join(run.label for run in runs)
    parts = [_head(runs[0]) if len(runs) == 1 else _heads(runs)]
    for name, question, charts in charts_of(runs):
        drawn = "".join(_figure(each, tokens=tokens) for each in charts)
        parts.append(f'<h2>{escape(name)}<small>{escape(question)}</small></h2><div class="charts">{drawn}</div>')
    parts += [_rest(run, is_only=len(runs) == 1) for run in runs]
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} · LaMDA</title><style>{style}</style></head><body>\n"
        + "\n".join([*parts, f"<footer>lamda report, version {escape(__version__)}, {made}</footer>"])
        + f"<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _status(run: Findings) -> str:
    return f'<span class="status {escape(run.standing.status)}">{escape(run.standing.status)}</span>'


def _reason(run: Findings) -> str:
    return f'<p class="reason">{escape(run.standing.reason)}</p>' if run.standing.reason else ""


def _head(run: Findings) -> str:
    """Name, status, how far it is, and what it has come to."""
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in run.figures())
    bar = ""
    if run.share is not None:
        bar = f'<progress max="1" value="{run.share:.4f}" aria-label="share of all steps"></progress>'
    return (
        f"<header><h1>{escape(run.label)}</h1>{_status(run)}<p>{escape(str(run.path.resolve()))}</p></header>"
        f'{_reason(run)}{bar}<dl class="tiles">{tiles}</dl>'
    )


def _heads(runs: Sequence[Findings]) -> str:
    """The runs in a table, a colour each, and the settings that tell them apart."""
    columns = dict.fromkeys(name for run in runs for name, _ in run.figures())
    rows = []
    for number, run in enumerate(runs):
        own = dict(run.figures())
        name = f'<ul class="legend"><li class="{_colour(number)}">{escape(run.label)}</li></ul>'
        rows.append([name, _status(run), *(escape(own.get(column, NONE)) for column in columns)])
    parts = [f"<header><h1>{len(runs)} runs</h1></header>", _table(["run", "status", *columns], rows)]
    parts += [f"<h3>{escape(run.label)}</h3>{_reason(run)}" for run in runs if run.standing.reason]
    if different := differences(runs):
        rows = [[escape(key), *map(escape, values)] for key, values in different]
        parts.append("<h2>Settings<small>In what do they differ?</small></h2>")
        parts.append(_table(["key", *(run.label for run in runs)], rows))
    return "".join(parts)


def _figure(drawn: Chart, *, tokens: float) -> str:
    """A chart with its title, its legend, and room for the values under a pointer."""
    legend = ""
    if len(drawn.curves) > 1:
        items = (f'<li class="{_colour(number)}">{escape(curve.run)}</li>' for number, curve in enumerate(drawn.curves))
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    svg = chart(drawn.curves, title=drawn.title, panel=drawn.panel, tokens=tokens)
    return (
        f"<figure><figcaption><h3>{escape(drawn.title)}</h3><span>{escape(drawn.panel.unit)}</span></figcaption>"
        f'{legend}{svg}<p class="values" aria-live="off"></p></figure>'
    )


def _colour(number: int) -> str:
    return f"c{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _rest(run: Findings, *, is_only: bool) -> str:
    """What the model wrote, checkpoints, warnings and the configuration; folded where there are several runs."""
    parts = [f"<h2>{'What else there is' if is_only else escape(run.label)}</h2>"]
    opened = " open" if is_only else ""
    if run.sample is not None:
        name, text = run.sample
        given, divider, written = text.partition(DIVIDER)
        body = f"{escape(given)}<mark>{divider}</mark>{escape(written)}" if divider else escape(text)
        parts.append(f"<details{opened}><summary>A sample, {escape(name)}</summary><pre>{body}</pre></details>")
    if run.checkpoints:
        table = _table(["checkpoint", "size", "ranks", "ZeRO", "age", "state"], map(_checkpoint, run.checkpoints))
        parts.append(f"<details{opened}><summary>Checkpoints</summary>{table}</details>")
    if run.warnings:
        lines = escape("\n".join(run.warnings))
        parts.append(f"<details{opened}><summary>Warnings in train.log</summary><pre>{lines}</pre></details>")
    if run.config_text:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(parts)


def _checkpoint(saved: Saved) -> list[str]:
    age = NONE if saved.age_seconds is None else duration(saved.age_seconds)
    ranks, stage = (NONE if value is None else str(value) for value in (saved.ranks, saved.zero_stage))
    return [escape(each) for each in (saved.path.name, size_of(saved.bytes), ranks, stage, age, saved.state)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide; rows hold markup, the header text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
