"""Tables and curves of `benchmark.py learning`, from its record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from lamda.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Mapping[str, Any]

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's 97.5% quantile for 1, 2, ... degrees of freedom."""
NORMAL = 1.959964

COLORS = {
    "lamda": "#000000", "llama": "#0072B2", "gpt2": "#E69F00", "x-transformers": "#009E73", "nanochat": "#D55E00"
}  # fmt: skip
"""From the palette of Okabe and Ito, which color-blind people can distinguish."""


@dataclass(frozen=True)
class Line:
    """A model with one recipe, at its best rate. means: mean loss by rate, inf if a run diverged."""

    name: str
    model: str
    rate: float
    runs: Sequence[Run]
    means: Mapping[float, float]

    @property
    def finals(self) -> dict[int, float]:
        """Held-out nats by seed."""
        return {run["seed"]: _final(run) for run in self.runs}


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval by Student's t; None for a single value."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), _quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5


def _quantile(freedom: int) -> float:
    """Beyond the table by its expansion in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5), to 0.1%."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    first = (NORMAL**3 + NORMAL) / 4
    second = (5 * NORMAL**5 + 16 * NORMAL**3 + 3 * NORMAL) / 96
    return NORMAL + first / freedom + second / freedom**2


def _final(run: Run) -> float:
    return inf if run["final"] is None else float(run["final"])


def _by(runs: Sequence[Run], *keys: str) -> dict[str, list[Run]]:
    """The runs that are alike in these keys, in the order of the record."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps([run[key] for key in keys], sort_keys=True), []).append(run)
    return found


def _means(runs: Sequence[Run]) -> dict[float, float]:
    """The mean final loss of each rate over the seeds that all rates have, or over its own where there is none.

    So more seeds of the best rate do not make it another one.
    """
    by_rate = {alike[0]["rate"]: {run["seed"]: _final(run) for run in alike} for alike in _by(runs, "rate").values()}
    shared = set.intersection(*map(set, by_rate.values())) if by_rate else set()
    return {
        rate: mean(loss for seed, loss in finals.items() if seed in (shared or finals))
        for rate, finals in sorted(by_rate.items())
    }


def best_rate(runs: Sequence[Run], alike: Mapping[str, Any]) -> float:
    """The rate with the lowest mean among the runs with these keys. Raises UserError where there is none."""
    found = [run for run in runs if all(run[key] == value for key, value in alike.items())]
    means = {rate: loss for rate, loss in _means(found).items() if isfinite(loss)}
    if not means:
        raise UserError(f"--lr best: the record has no run of {alike['model']} like this one; sweep its rates first")
    return min(means, key=lambda rate: means[rate])


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """A line for each model or label and recipe, the best first.

    A recipe is called by its model's name; where there are several, all but the newest are also called by what they
    have different.
    """
    lines = []
    for alike in _by(runs, "model", "label").values():
        by_recipe = _by(alike, "recipe")
        newest = alike[-1]["recipe"]
        for found in by_recipe.values():
            means = _means(found)
            rate = min(means, key=lambda each: means[each])
            name = found[0]["label"] or found[0]["model"]
            name += _differences(found[0]["recipe"], newest)
            lines.append(Line(name, found[0]["model"], rate, [run for run in found if run["rate"] == rate], means))
    return sorted(lines, key=lambda line: line.means[line.rate])


def _differences(recipe: Mapping[str, Any], newest: Mapping[str, Any]) -> str:
    keys = [key for key in {**recipe, **newest} if recipe.get(key) != newest.get(key)]
    return f" ({', '.join(f'{key} {recipe.get(key)}' for key in keys)})" if keys else ""


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a record, with what its runs were made on."""
    if not report["runs"]:
        raise UserError("the record has no run yet: measure first, without --markdown")
    text = []
    for runs in _by(report["runs"], "setting").values():
        setting = runs[0]["setting"]
        text.append(
            f"{setting['size']}, {setting['tokens']:,} tokens in steps of {setting['batch']} x "
            f"{setting['sequence_length']}, {setting['precision']}; {_made_on(runs)}."
        )
        if timed := _timing(report, setting):
            text.append(f"Time per token of all models in turn: {_made_on([timed])}.")
        lines = lines_of([run for run in runs if run["label"] is None])
        reference = next((line for line in lines if line.name == "lamda"), None)
        text += ["", *_table(lines, reference, timed["models"] if timed else {})]
        if labelled := lines_of([run for run in runs if run["label"] is not None]):
            text += ["", *_ablations(labelled, reference)]
        text.append("")
    return "\n".join(text)


def _made_on(runs: Sequence[Run]) -> str:
    """Machines and commits, each once."""
    facts = [run["environment"] for run in runs]
    made = dict.fromkeys(f"{each['device']} ({each['cpu']}, threads: {each['threads']})" for each in facts)
    commits = dict.fromkeys(_short(str(each["commit"])) for each in facts)
    return f"{', '.join(made)} at {', '.join(commits)}"


def _short(commit: str) -> str:
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def _timing(report: Mapping[str, Any], setting: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The newest measurement of time of these sizes."""
    wanted = {key: value for key, value in setting.items() if key not in ("tokens", "held_out")}
    return next((entry for entry in reversed(report["times"]) if entry["setting"] == wanted), None)


def _table(lines: Sequence[Line], reference: Line | None, times: Mapping[str, Any]) -> Iterator[str]:
    yield _row("model", "rate", "held-out nats", "bits per byte", "to lamda", "time per token", "matrices",
               "parameters", "FLOPs per token", "other rates")  # fmt: skip
    yield _row("---", *["---:"] * 8, "---")
    for line in lines:
        sizes, time = line.runs[0]["parameters"], times.get(line.model)
        yield _row(
            line.name,
            f"{line.rate:g}",
            _mean(list(line.finals.values())),
            f"{mean(run.get('bits_per_byte', nan) for run in line.runs):.4f}",
            _difference(line, reference),
            "" if time is None else f"{time['ratio']:.2f}",
            *(f"{sizes[kind]:,}" for kind in ("matrices", "parameters", "flops_per_token")),
            _other_rates(line),
        )


def _ablations(lines: Sequence[Line], reference: Line | None) -> Iterator[str]:
    yield _row("lamda with", "rate", "held-out nats", "to lamda", "other rates")
    yield _row("---", *["---:"] * 3, "---")
    for line in lines:
        nats = _mean(list(line.finals.values()))
        yield _row(line.name, f"{line.rate:g}", nats, _difference(line, reference), _other_rates(line))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _other_rates(line: Line) -> str:
    others = {rate: loss for rate, loss in line.means.items() if rate != line.rate}
    return "; ".join(f"{rate:g}: {_nats(loss)}" for rate, loss in others.items())


def _nats(loss: float) -> str:
    return f"{loss:.4f}" if isfinite(loss) else "diverged"


def _mean(finals: Sequence[float]) -> str:
    """`MEAN ± HALF (N seeds)`."""
    if not all(map(isfinite, finals)):
        return "diverged"
    middle, half = t_interval(finals)
    seeds = f"{len(finals)} seed{'s' * (len(finals) > 1)}"
    return f"{middle:.4f} ({seeds})" if half is None else f"{middle:.4f} ± {half:.4f} ({seeds})"


def _difference(line: Line, reference: Line | None) -> str:
    """Over the seeds that both have, whose rows are the same; without an interval where that is one, or none."""
    if reference is None or line is reference:
        return ""
    own, other = line.finals, reference.finals
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if not all(map(isfinite, [*own.values(), *other.values()])):
        return ""
    middle, half = t_interval(differences or [mean(own.values()) - mean(other.values())])
    return f"{middle:+.4f}" if half is None else f"{middle:+.4f} ± {half:.4f}"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Held-out nats of each model at its best rate, by tokens and by seconds; two panels for each table.

    Raises UserError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--picture needs matplotlib ({error}); pip install 'lamda-pytorch[plot]'") from error
    settings = [each for each in _by(report["runs"], "setting").values() if any(run["label"] is None for run in each)]
    if not settings:
        raise UserError("the record has no run to draw yet: measure first, without --picture")
    figure = Figure(figsize=(11, 1 + 4 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), 2, sharey="row", squeeze=False)
    for (left, right), runs in zip(axes, settings, strict=True):
        timed = _timing(report, runs[0]["setting"])
        _draw_setting(left, right, runs, timed["models"] if timed else {})
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {file}: cannot be written ({error})") from error


def _draw_setting(left: Axes, right: Axes, runs: Sequence[Run], times: Mapping[str, Any]) -> None:
    lines = [line for line in lines_of([run for run in runs if run["label"] is None]) if line.means[line.rate] < inf]
    for line in lines:
        tokens, nats = np.mean([run["held_out"] for run in line.runs], axis=0).T
        kind = line.model.removesuffix("+")
        dash = "-" if line.name == kind else "--" if line.name == line.model else ":"
        style: dict[str, Any] = {"color": COLORS[kind], "linestyle": dash, "marker": "o", "markersize": 3}
        left.plot(tokens / 1e6, nats, label=line.name, **style)
        if line.model in times:
            right.plot(tokens * times[line.model]["seconds_per_token"], nats, **style)
    setting = runs[0]["setting"]
    left.set_title(f"{setting['size']}, {setting['precision']}", loc="left", fontsize="small")
    left.set_xlabel("million tokens")
    right.set_xlabel("seconds, from the time per token" if times else "seconds: not measured (--time)")
    left.set_ylabel("held-out nats per token")
    left.legend(frameon=False, fontsize="small")
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
