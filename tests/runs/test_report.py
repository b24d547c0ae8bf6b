"""A report shows a run's rows and files, and takes no text of theirs for markup. In a browser: `tests/browser`."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from lamda.cli import main
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.runs.curves import Curve
from lamda.runs.panels import PANELS
from lamda.runs.svg_chart import BINS, HEIGHT, WIDTH, Axis, Bins, draw_chart
from lamda.storage.metrics import MetricsFile
from tests.runs.conftest import leave_status, make_run, save_checkpoint

MARKUP = "</script><img src=x onerror=\"document.title='broken'\">"


def write_run(path, *, steps=200, lr=1e-3, domains=("FreeLaw", MARKUP), status="finished"):
    """A run with all that a report shows, whose texts want to be markup."""
    directory = make_run(path)
    config = Config(train={"steps": 300, "lr": lr}, run={"dir": str(path)}, wandb={"name": MARKUP})
    directory.config.write_text(to_yaml(config))
    with MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=0) as file:
        for step in range(1, steps + 1):
            loss = 8 - 4 * step / steps
            row = {"step": step, "loss": loss if step != 50 else np.nan, "lr": lr, "tokens": 1000 * step, "mfu": None}
            row |= {
                "tokens_per_second": 2e6,
                "step_seconds": 0.5,
                "skipped_steps": 0 if step < 50 else 1,
                "rollbacks": 0,
            }
            row |= {f"loss/{name}": loss + place for place, name in enumerate(domains)}
            if step % 100 == 0:
                row |= {"eval/loss": 5.0 - step / 100, "eval/bits_per_byte": 1.5, "eval/copa/acc": 0.25 * step / 100}
            file.write(row)
    leave_status(directory, status, step=steps, steps=300, reason=f"because {MARKUP}")
    directory.samples.mkdir()
    (directory.samples / "step-00000200.txt").write_text(f"It was⟫ a {MARKUP}", "utf-8")
    directory.log.write_text(f"2026-01-01 INFO x: quiet\n2026-01-01 WARNING x: loud {MARKUP}\n")
    return path


class Reader(HTMLParser):
    """Elements by name, with their attributes; and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def made(tmp_path, weights, capsys):
    run = write_run(tmp_path / "run")
    save_checkpoint(run, 200, weights(1), ranks=2)
    assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "report.html" in capsys.readouterr().out
    return (tmp_path / "report.html").read_text("utf-8")


def test_a_report_tells_what_the_files_of_a_run_tell(made):
    page = Reader(made)
    for message in (
        "200/300", "finished", f"because {MARKUP}", "step-00000200", "4.9900", "3.0000", "1.5000", "1m40s",
        "It was", f" a {MARKUP}", f"WARNING x: loud {MARKUP}", "lr: 0.001",
    ):  # fmt: skip
        assert message in page.text, message
    assert "INFO x: quiet" not in page.text
    config = re.search(r"<summary>Configuration</summary><pre>(.*?)</pre>", made, re.S)[1]
    assert yaml.safe_load(unescape(config))["wandb"]["name"] == MARKUP


def test_charts_are_the_catalogues_in_its_order_and_none_is_empty(made):
    titles = [unescape(title) for title in re.findall(r"<figure><figcaption><h3>(.*?)</h3>", made)]
    assert titles == [
        "Training loss", "Training loss by domain", "Learning rate", "Throughput", "Step time", "Skipped steps",
        "Held-out loss", "Held-out bits per byte", "Tasks and ratings: acc",
    ]  # fmt: skip
    curves = [[curve["name"] for curve in json.loads(svg["data-chart"])["curves"]] for svg in Reader(made).all("svg")]
    assert curves[1] == ["FreeLaw", MARKUP]
    assert curves[5] == ["skipped steps", "rollbacks"]
    assert curves[8] == ["copa"]


def test_nothing_is_fetched_and_nothing_of_a_run_is_markup(made):
    page = Reader(made)
    assert page.all("img") == []
    assert [set(script) for script in page.all("script")] == [set()]
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert not re.search(r"(src|href)=\"?(https?:)?//", made)
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_runs_side_by_side_have_a_curve_each_and_their_differences(tmp_path, weights):
    runs = [write_run(tmp_path / name, lr=lr, domains=("a", "b")) for name, lr in (("low", 1e-3), ("high", 2e-3))]
    assert main(["report", *map(str, runs), str(runs[0]), "-o", str(tmp_path / "two.html")]) == 0
    text = (tmp_path / "two.html").read_text("utf-8")
    page = Reader(text)
    assert "2 runs" in page.text
    assert "<tr><td>train.lr</td><td>0.001</td><td>0.002</td></tr>" in text
    assert "run.dir</td>" not in text
    titles = re.findall(r"<figure><figcaption><h3>(.*?)</h3>", text)
    assert titles[:4] == ["Training loss", "Training loss by domain: a", "Training loss by domain: b", "Learning rate"]
    for svg in page.all("svg"):
        assert [curve["name"] for curve in json.loads(svg["data-chart"])["curves"]] == ["low", "high"]


def test_long_curves_are_drawn_from_bins_that_hold_every_point():
    x = np.arange(1.0, 100_001)
    y = np.sin(x) + np.where(x == 77_777, 50, 0)
    bins = Bins.of(Curve("r", x, y))
    assert len(bins.x) == BINS
    assert bins.high.max() == y.max()
    assert bins.low.min() == y.min()
    sizes = np.array([len(part) for part in np.array_split(x, BINS)])
    assert (bins.mean * sizes).sum() == pytest.approx(y.sum())
    drawn = draw_chart([Curve("r", x, y)], title="t", panel=PANELS[0], tokens=1e5)
    assert len(drawn) < 60_000
    places = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML](-?[\d.]+ -?[\d.]+)", drawn)]
    assert all(0 <= across <= WIDTH and 0 <= up <= HEIGHT for across, up in places)


def test_values_that_are_not_finite_leave_a_gap_and_a_cross():
    x, y = np.arange(1.0, 7), np.array([1, 2, np.nan, 4, np.inf, 6])
    drawn = draw_chart([Curve("r", x, y)], title="t", panel=PANELS[0], tokens=6.0)
    line = re.search(r'<path class="line c0" d="(.*?)"', drawn)[1]
    assert (line.count("M"), line.count("L")) == (3, 1)
    assert drawn.count("×") == 2
    assert json.loads(unescape(re.search(r'data-chart="(.*?)"', drawn)[1]))["curves"][0]["y"] == [
        1,
        2,
        None,
        4,
        None,
        6,
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-5, 3e-4), (4.1, 4.13), (0, 2.5e9)])
def test_marks_of_an_axis_are_round_and_inside(low, high):
    marks = Axis(low, high, 0, 100).ticks(5)
    assert 2 <= len(marks) <= 7
    assert all(low - 1e-9 <= mark <= high * (1 + 1e-9) for mark in marks)
    apart = np.diff(marks)
    assert apart == pytest.approx(np.full(len(apart), apart[0]))
    assert float(f"{apart[0]:.0e}") == pytest.approx(apart[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-o", "report.pdf"], "-o report.pdf: a report is a .html or .htm file"),
        (["rum", "-o", "report.html"], "rum: no run with a finished step here; did you mean 'run'?"),
        (["run", "-o", "no/report.html"], "-o no/report.html: cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_are_reported(tmp_path, monkeypatch, capsys, arguments, message):
    write_run(tmp_path / "run", steps=3)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
