"""`lamda plot` draws what metrics.jsonl holds, and says what it cannot draw."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lamda.config.errors import UserError
from lamda.runs.curves import read_curves, smoothed
from lamda.runs.plot import COLORS, NOT_FINITE, draw, main
from lamda.storage.metrics import MetricsFile
from tests.runs.conftest import make_run

FLOATS = st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf])


@pytest.fixture
def runs(tmp_path):
    """Two runs of 100 steps; only the second was evaluated, and its step 50 was refused."""
    first = make_run(tmp_path / "first", losses=np.linspace(9, 3, 100), tokens_per_second=2e6, step_seconds=36.0)
    second = make_run(tmp_path / "second")
    with MetricsFile(second.metrics, discarded=second.discarded_metrics, step=0) as file:
        for step in range(1, 101):
            row = {"step": step, "loss": 8 - step / 20 if step != 50 else np.nan, "tokens": 1000 * step}
            held_out = {"eval/loss": step / 10} if step % 25 == 0 else {}
            file.write({**row, "tokens_per_second": 1e6, "step_seconds": 18.0, **held_out})
    return [first.path, second.path]


@given(st.lists(FLOATS, max_size=30), st.integers(1, 40))
def test_the_mean_of_the_last_points_leaves_out_what_is_not_finite(values, count):
    for place, found in enumerate(smoothed(np.array(values), count)):
        window = [value for value in values[max(0, place + 1 - count) : place + 1] if np.isfinite(value)]
        assert found == pytest.approx(np.mean(window), abs=1e-6) if np.isfinite(values[place]) else np.isnan(found)


def test_curves_are_the_rows_of_each_run(runs):
    first, second = read_curves(runs, ["loss"], x="step")["loss"]
    assert (first.run, second.run) == ("first", "second")
    assert first.x.tolist() == list(range(1, 101))
    assert first.y == pytest.approx(np.linspace(9, 3, 100))
    assert np.flatnonzero(np.isnan(second.y)).tolist() == [49]
    without, evaluated = read_curves(runs, ["eval/loss"], x="step")["eval/loss"]
    assert without.x.size == 0
    assert (evaluated.x.tolist(), evaluated.y.tolist()) == ([25, 50, 75, 100], [2.5, 5, 7.5, 10])


def test_what_lies_to_the_right_is_steps_tokens_or_hours(runs):
    assert read_curves(runs[1:], ["eval/loss"], x="tokens")["eval/loss"][0].x.tolist() == [25e3, 50e3, 75e3, 100e3]
    assert read_curves(runs, ["loss"], x="time")["loss"][0].x[-1] == pytest.approx(100 * 36 / 3600)
    with pytest.raises(UserError, match="--x tokens: first has no column tokens"):
        read_curves(runs, ["loss"], x="tokens")


def test_runs_of_the_same_name_are_reported_by_their_paths(tmp_path):
    paths = [make_run(tmp_path / folder / "run", losses=[1.0]).path for folder in "ab"]
    assert [curve.run for curve in read_curves(paths, ["loss"], x="step")["loss"]] == [str(path) for path in paths]


def test_a_picture_has_a_panel_a_metric_and_a_color_a_run(runs):
    panels = read_curves(runs, ["loss", "eval/loss"], x="step")
    figure = draw(panels, x="step", log=False, smooth=10)
    loss, evaluation = figure.axes
    assert (loss.get_ylabel(), evaluation.get_xlabel()) == ("loss (nats per token)", "step")
    drawn = {line.get_label(): line for line in loss.lines}
    assert drawn["first"].get_ydata() == pytest.approx(smoothed(panels["loss"][0].y, 10))
    assert [drawn[name].get_color() for name in ("first", "second")] == list(COLORS[:2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    (refused,) = (line for line in loss.lines if line.get_gid() == NOT_FINITE and line.get_xdata().size)
    assert refused.get_xdata().tolist() == [50]
    assert "mean of the last 10 points" in loss.get_title(loc="right")
    # Four points are too few for a mean.
    assert {line.get_label(): line for line in evaluation.lines}["second"].get_ydata().tolist() == [2.5, 5, 7.5, 10]


def test_the_png_shows_every_run_in_its_color(runs, tmp_path, capsys):
    file = tmp_path / "loss.png"
    assert main([*map(str, runs), "-o", str(file), "--metric", "loss", "tokens_per_second"]) == 0
    assert capsys.readouterr().out == f"{file}: loss\n{file}: tokens_per_second\n"
    picture = imread(file)[..., :3]
    for color in COLORS[:2]:
        assert (np.abs(picture - to_rgb(color)).max(axis=-1) < 0.02).sum() > 500


@pytest.mark.parametrize(("suffix", "begin"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_decides_the_format(runs, tmp_path, suffix, begin):
    main([str(runs[0]), "-o", str(tmp_path / f"loss.{suffix}"), "--log"])
    assert (tmp_path / f"loss.{suffix}").read_bytes().startswith(begin)


def test_a_run_without_the_metric_is_named(runs, tmp_path, capsys):
    main([*map(str, runs), "-o", str(tmp_path / "x.png"), "--metric", "eval/loss"])
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}: eval/loss; missing in first\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.gif"], r"-o x.gif: must end in .png, .svg, .pdf"),
        (["-o", "x.png", "--smooth", "0"], "--smooth 0: must be at least 1"),
        (["-o", "x.png", "--metric", "los"], "--metric los: no run has it; did you mean 'loss'"),
        (["-o", "x.png", "--metric", "name"], "--metric name: has values that are not numbers"),
        (["-o", "x.png", "--metric", "below", "--log"], "--log: below has no value above 0"),
        (["-o", "/none/x.png"], "-o /none/x.png: cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_reported(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", losses=[2.0, 1.0], name="x", below=-1.0)
    with pytest.raises(UserError, match=message):
        main(["run", *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_without_a_run_names_the_nearest(runs, tmp_path):
    with pytest.raises(UserError, match=r"no run with a finished step here; did you mean 'second'"):
        main([str(tmp_path / "secnd"), "-o", str(tmp_path / "x.png")])


def test_without_matplotlib_the_way_to_get_it_is_reported(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lamda-pytorch\[plot\]'"):
        main([str(runs[0]), "-o", str(tmp_path / "x.png")])
