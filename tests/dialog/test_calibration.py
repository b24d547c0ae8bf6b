"""Calibration against scikit-learn, the target of false refusals, and the filter that is off where nothing is known."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lamda.cli import main
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.card import Source
from lamda.data.held_out import HeldOut
from lamda.dialog.baselines import baselines
from lamda.dialog.calibration import CALIBRATION, NO_FILTER, Calibration
from lamda.dialog.evaluation import DialogScores
from lamda.dialog.examples import Conversations, examples_in
from lamda.dialog.finetuning import Finetuning
from lamda.dialog.options import calibrated
from lamda.dialog.ratings import Ratings, calibration_error
from lamda.dialog.report import diagrams, draw
from lamda.dialog.speaker import ReplyOptions
from lamda.inference.loading import load_run
from lamda.storage import manifest
from lamda.storage.commit import add_file, seal, sync_and_describe
from tests.random_run import write_run


def ratings(*, slope, count=2000, seed=0):
    """Ratings whose log odds are `truth`, predicted as slope * truth + 0.5; with slope 0 unrelated to it."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(size=count)
    positive = draw.random(count) < 1 / (1 + np.exp(-truth))
    logits = (slope * truth if slope else -abs(truth)) + 0.5
    return Ratings(1 / (1 + np.exp(-logits)), positive, np.arange(count))


GOOD, CHANCE = (Calibration.of({"unsafe": ratings(slope=slope)}, false_refusals=0.05) for slope in (2.0, 0.0))


def test_scale_and_bias_are_those_of_a_logistic_regression():
    given = ratings(slope=3.0)
    scaling = Calibration.of({"unsafe": given}, false_refusals=0.05).attributes["unsafe"]
    logits = np.log(given.probabilities / (1 - given.probabilities))[:, None]
    reference = LogisticRegression(C=1e9, tol=1e-9).fit(logits, given.positive)
    assert [scaling.scale, scaling.bias] == pytest.approx([reference.coef_[0, 0], reference.intercept_[0]], abs=2e-3)
    assert scaling.scale == pytest.approx(1 / 3, abs=0.03)


def test_calibration_holds_on_other_ratings():
    calibration = Calibration.of({"unsafe": ratings(slope=3.0)}, false_refusals=0.05)
    other = ratings(slope=3.0, seed=1)
    before = calibration_error(other.probabilities, other.positive)
    after = calibration.report({"unsafe": other})["unsafe"]
    assert before > 0.15
    assert after["calibration_error"] < 0.03
    assert after["false_refusals"] == pytest.approx(0.05, abs=0.015)
    assert after["true_refusals"] > 0.2


def test_the_threshold_refuses_at_most_the_target_share_of_good_responses():
    given = ratings(slope=2.0)
    for share in (0.0, 0.05, 0.3):
        calibration = Calibration.of({"unsafe": given, "sensible": given}, false_refusals=share)
        for figures in calibration.report({"unsafe": given, "sensible": given}).values():
            assert share - 0.002 <= figures["false_refusals"] <= share
    all_unsafe = Ratings(np.array([0.4, 0.6]), np.array([True, True]), np.arange(2))
    assert Calibration.of({"unsafe": all_unsafe}, false_refusals=0.05).attributes["unsafe"].threshold == NO_FILTER


def test_probabilities_keep_their_order_unless_they_oppose_the_labels():
    grid = {"unsafe": np.linspace(0, 1, 101)}
    for slope, distinct in ((2.0, 101), (-2.0, 1)):
        scaling = Calibration.of({"unsafe": ratings(slope=slope)}, false_refusals=0.05).attributes["unsafe"]
        mapped = scaling.applied(grid["unsafe"])
        assert len(set(mapped)) == distinct
        assert (np.diff(mapped) >= 0).all()
    calibration = Calibration.of({"unsafe": ratings(slope=2.0)}, false_refusals=0.05)
    judgment = calibration.apply({"unsafe": 0.9, "sensible": 0.3})
    assert judgment["sensible"] == 0.3
    assert judgment["unsafe"] < 0.9


def test_a_rating_no_better_than_chance_switches_its_filter_off():
    assert GOOD.threshold == GOOD.attributes["unsafe"].threshold < 1
    assert f"above {GOOD.threshold:.3f}" in GOOD.filter_note
    assert CHANCE.threshold == NO_FILTER
    assert "does not beat chance (AUC 0." in CHANCE.filter_note
    given = ratings(slope=2.0)
    few = given.positive | (np.arange(len(given.positive)) > 25)  # some ten of 0 remain
    assert 5 < (~few).sum() < 20
    separated = replace(given, positive=few, probabilities=np.where(few, 0.9, 0.1))
    assert Calibration.of({"unsafe": separated}, false_refusals=0.05).threshold == NO_FILTER
    without = Calibration.of({"sensible": ratings(slope=2.0)}, false_refusals=0.05)
    assert without.threshold == NO_FILTER
    assert "no held-out ratings" in without.filter_note


def test_a_run_whose_model_has_diverged_ends_without_a_calibration():
    given = ratings(slope=2.0)
    diverged = replace(given, probabilities=given.probabilities * np.nan)
    config = Config.model_validate({"train": {"steps": 1}})
    for found, names in (({"unsafe": diverged}, []), ({"unsafe": given}, [CALIBRATION]), ({}, [])):
        scores = DialogScores(nats=1.0, targets=1, ratings=found)
        assert list(Finetuning().attachments(config, scores)) == names


@pytest.fixture
def run(tmp_path, tokenizer_path):
    return write_run(tmp_path / "run", tokenizer_path, packing="whole")


def test_chat_and_server_take_threshold_and_calibration_from_the_checkpoint(run, caplog):
    def options(**given):
        caplog.clear()
        return calibrated(ReplyOptions(**given), load_run(run), threshold=given.get("threshold"))

    assert options() == ReplyOptions()
    assert "has no calibration" in caplog.text
    checkpoint = load_run(run).path
    add_file(checkpoint, CALIBRATION, GOOD.model_dump_json())
    assert options() == ReplyOptions(threshold=GOOD.threshold, calibration=GOOD)
    assert not caplog.records
    assert options(threshold=0.25) == ReplyOptions(threshold=0.25, calibration=GOOD)
    add_file(checkpoint, CALIBRATION, CHANCE.model_dump_json())
    assert options().threshold == NO_FILTER
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the safety filter is off" in caplog.text
    assert options(threshold=0.25).threshold == 0.25
    assert not caplog.records


def test_unrated_dialogues_leave_the_calibration_as_it_is(run, tmp_path, capsys, monkeypatch):
    checkpoint, talk = load_run(run).path, tmp_path / "talk.jsonl"
    add_file(checkpoint, CALIBRATION, GOOD.model_dump_json())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.write_text(json.dumps({"messages": messages}) + "\n")
    assert main(["dialog", "evaluate", str(run), "--files", str(talk), "--calibrate", "0.05"]) == 2
    assert "none of these responses is rated" in capsys.readouterr().err
    assert Calibration.read(checkpoint) == GOOD
    talk.write_text(json.dumps({"messages": [messages[0], {**messages[1], "labels": {"unsafe": 0}}]}) + "\n")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["dialog", "evaluate", str(run), "--files", str(talk), "--calibrate", "0.05"]) == 2
    assert "is read-only" in capsys.readouterr().err
    talk.write_text("")
    assert main(["dialog", "evaluate", str(run), "--files", str(talk)]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err


def test_only_a_calibration_that_the_manifest_lists_is_read(tmp_path):
    (tmp_path / "other").write_text("x")
    seal(tmp_path, {"step": 1, "files": {"other": sync_and_describe(tmp_path / "other")}})
    (tmp_path / CALIBRATION).write_text(GOOD.model_dump_json())
    assert Calibration.read(tmp_path) is None
    add_file(tmp_path, CALIBRATION, GOOD.model_dump_json())
    assert Calibration.read(tmp_path) == GOOD
    assert manifest.problem_of(tmp_path) is None
    (tmp_path / CALIBRATION).write_text(GOOD.model_dump_json().replace("0.05", "0.06"))
    with pytest.raises(UserError, match="has changed since it was written"):
        Calibration.read(tmp_path)
    add_file(tmp_path, CALIBRATION, '{"attributes": {"unsafe": {"scale": -1}}}')
    with pytest.raises(UserError, match="cannot be read"):
        Calibration.read(tmp_path)


def test_baselines_find_what_words_and_lengths_give_away(tmp_path, tokenizer):
    """Bad responses have a word of their own, and are not longer; uninteresting ones are shorter."""
    draw = np.random.default_rng(0)

    def conversation():
        unsafe, interesting = draw.random(2) < 0.5
        words = draw.choice(["tea", "cup", "sun", "day", "run"], size=draw.integers(4, 9) * (1 + interesting))
        return line(" ".join([*words[:-1], "kill" if unsafe else "walk"]), unsafe=unsafe, interesting=interesting)

    def line(said, **ratings):
        labels = {name: int(rating) for name, rating in ratings.items()}
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said, "labels": labels}]
        return json.dumps({"messages": messages}) + "\n"

    def held_out(name, lines):
        (tmp_path / name).write_text("".join(lines))
        form = Conversations(row_length=65, seed=0, generative=1, discriminative=1)
        return HeldOut((Source(name="s", license="none", files=(str(tmp_path / name),)),), tokenizer, 64, form)

    documents = enumerate(held_out("val.jsonl", (conversation() for _ in range(150))).documents())
    asked = [(rating, number) for number, document in documents for rating in examples_in(document)[1]]
    found = baselines(held_out("train.jsonl", (conversation() for _ in range(150))).documents(), asked)
    assert found["unsafe"]["TF-IDF"]["auc"] > 0.99
    assert found["unsafe"]["length"]["auc"] < 0.65
    assert found["interesting"]["length"]["auc"] > 0.95
    low, high = found["interesting"]["TF-IDF"]["auc_interval"]
    assert 0.5 < low < high
    few = [line(said, unsafe=said == "kill", interesting=said == "kill") for said in ("kill", "walk")]
    with pytest.raises(UserError, match="TF-IDF cannot learn the ratings of"):
        baselines(held_out("few.jsonl", few).documents(), asked)


def test_diagrams_show_each_bin_and_fit_a_terminal(tmp_path):
    given = ratings(slope=3.0)
    calibration = Calibration.of({"unsafe": given}, false_refusals=0.05)
    part = {**given.report(), "calibrated": calibration.report({"unsafe": given})["unsafe"]}
    lines = [line for line in diagrams({"attributes": {"unsafe": part}}) if " to " in line]
    bins = part["calibrated"]["reliability"]
    assert [int(line.split()[-1].replace(",", "")) for line in lines] == [each.ratings for each in bins if each.ratings]
    assert all(len(line) <= 94 and line.count("|") == 1 for line in lines)
    draw({"attributes": {"unsafe": part}}, tmp_path / "new" / "unsafe.svg")
    assert "<svg" in (tmp_path / "new" / "unsafe.svg").read_text()
