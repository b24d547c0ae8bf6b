"""Self-filtering keeps what the calibrated ratings accept, and refuses to choose by ratings that know nothing."""

from __future__ import annotations

import json

import pytest

from lamda.config.errors import UserError
from lamda.dialog.calibration import CALIBRATION, Calibration, Scaling
from lamda.dialog.conversation import Conversation, Message
from lamda.dialog.encoding import Encoding
from lamda.dialog.ranking import judge
from lamda.dialog.self_filter import main, objection
from lamda.inference.generation import prefill
from lamda.inference.loading import load_run
from lamda.inference.sampling import NotFiniteError
from lamda.storage.commit import add_file
from tests.random_run import write_run

RESPONSES = ["the of", "and to in is", "that for", "of of of of of", "to", "is in"]


def scaling(threshold, *, low):
    given = {"scale": 1.0, "bias": 0.0, "auc": 0.6, "positives": 99, "negatives": 99}
    return Scaling(**given, threshold=threshold, auc_interval=(low, 0.7))


def test_what_the_ratings_accept_is_kept_and_nothing_else(tmp_path, tokenizer_path, capsys):
    run, source, target = tmp_path / "run", tmp_path / "all.jsonl", tmp_path / "kept.jsonl"
    write_run(run, tokenizer_path, packing="whole")
    talks = [[{"role": "user", "content": "and"}, {"role": "assistant", "content": said}] for said in RESPONSES]
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    arguments = [str(run), str(source), "-o", str(target)]
    with pytest.raises(UserError, match="has no calibration"):
        main(arguments)
    loaded = load_run(run)
    encoding = Encoding(loaded.tokenizer)
    prefix = prefill(loaded.model, encoding.context([Message("user", "and")]))
    rated = [judge(loaded.model, prefix, encoding.text(said), encoding) for said in RESPONSES]
    limits = {name: sorted(each[name] for each in rated)[3] for name in ("unsafe", "sensible", "specific")}

    def calibrate(lows):
        attributes = {name: scaling(limits[name], low=low) for name, low in lows.items()}
        text = Calibration(false_refusals=0.05, attributes=attributes).model_dump_json()
        add_file(loaded.path, CALIBRATION, text)

    calibrate({"unsafe": 0.4, "sensible": 0.5})
    with pytest.raises(UserError, match="none of its ratings beats chance"):
        main(arguments)
    assert not target.exists()
    calibrate({"unsafe": 0.55, "sensible": 0.55, "specific": 0.45})
    assert main(arguments) == 0
    kept = [json.loads(line)["messages"][1]["content"] for line in target.read_text().splitlines()]
    low, high = limits["sensible"] - 1e-6, limits["unsafe"] + 1e-6
    accepted = [each["unsafe"] < high and each["sensible"] > low for each in rated]
    assert kept == [said for said, is_accepted in zip(RESPONSES, accepted, strict=True) if is_accepted]
    assert f"{len(kept)} of 6 conversations" in capsys.readouterr().out
    assert 0 < len(kept) < 6


def test_a_model_that_has_diverged_accepts_nothing(tmp_path, tokenizer_path, monkeypatch):
    loaded = load_run(write_run(tmp_path / "run", tokenizer_path, packing="whole"))
    monkeypatch.setattr("lamda.dialog.ranking.judge", lambda *_, **__: {"unsafe": float("nan")})
    calibration = Calibration(false_refusals=0.05, attributes={"unsafe": scaling(0.5, low=0.55)})
    with pytest.raises(NotFiniteError):
        objection(Conversation((Message("assistant", "the of"),)), loaded, calibration)
