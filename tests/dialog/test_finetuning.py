"""A whole fine-tuning: from a checkpoint's weights, on two ranks, stopped and gone on with on one, the same run."""

import io
import json
import shutil
from math import inf, nan

import pytest
from safetensors.torch import load_file, save_file

from lamda.cli import main
from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.dialog.calibration import Calibration
from lamda.dialog.conversation import ATTRIBUTES
from lamda.dialog.evaluate import main as evaluate
from lamda.dialog.evaluation import DialogScores, evaluate_checkpoint
from lamda.inference.sampling import NotFiniteError
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.runs.trace import trace
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.training.inputs import with_initial_weights
from tests.dialog.test_examples import talk
from tests.launch import run_ranks

MODEL = {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 16, "d_ff": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_path):
    """A folder with a pre-trained checkpoint, dialogues (one line of them bad) and a configuration."""
    folder = tmp_path_factory.mktemp("finetuning")
    start = folder / "pretrained"
    start.mkdir()
    model = LaMDA(ModelConfig(**MODEL))
    initialize_weights(model, seed=2)
    save_file(
        {name: weight.contiguous() for name, weight in model.export_weights().items()}, start / "model.safetensors"
    )
    (start / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    (start / "config.yaml").write_text(f"model: {json.dumps(MODEL)}\ntrain: {{steps: 1}}\n")
    lines = [json.dumps(talk(seed)) for seed in range(60)]
    lines.insert(7, '{"messages": [{"role": "bot", "content": "x"}]}')
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "val.jsonl").write_text("".join(json.dumps(talk(seed)) + "\n" for seed in range(100, 108)))
    (folder / "run.yaml").write_text(
        f"model: {{weights: '{start}'}}\n"
        f"data: {{corpus: dialog, files: '{folder}/train.jsonl', eval_files: '{folder}/val.jsonl', packing: whole, "
        "sequence_length: 64}\n"
        "train: {steps: 6, global_batch_size: 8, micro_batch_size: 2, lr: 1e-2}\n"
        "checkpoint: {every: 2}\nwandb: {mode: disabled}\n"
    )
    return folder


def finetune(place, run, *more, world_size):
    words = ["scripts/finetune.py", "--config", str(place / "run.yaml"), "--run.dir", str(place / run), *more]
    ranks = run_ranks(words, world_size=world_size)
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr[-2500:] for rank in ranks)
    return ranks[0].stdout


def test_a_stopped_run_continues_with_other_ranks_to_the_same_weights(place, monkeypatch):
    finetune(
        place, "broken", "--train.steps", "4", "--train.schedule", "wsd", "--train.decay_fraction", "0", world_size=2
    )
    finetune(place, "broken", "--train.schedule", "wsd", "--train.decay_fraction", "0", world_size=1)
    message = finetune(place, "alone", "--train.schedule", "wsd", "--train.decay_fraction", "0", world_size=1)
    assert "responses: " in message
    assert "95% interval" in message
    broken, alone = (read_metrics(place / run / "metrics.jsonl") for run in ("broken", "alone"))
    assert [row["batch_digest"] for row in broken] == [row["batch_digest"] for row in alone]
    last = "checkpoints/step-00000006/model.safetensors"
    one, other = (load_file(place / run / last) for run in ("broken", "alone"))
    assert all((one[name] == other[name]).all() for name in one)
    final = read_metrics(place / "alone/metrics.jsonl")[-1]
    assert {"eval/perplexity", "eval/auc/unsafe", "eval/accuracy/grounded"} <= final.keys()
    assert "loss/generative" in final or any(f"loss/{name}" in final for name in ("unsafe", "sensible"))
    (bad,) = {
        (entry["place"], entry["reason"])
        for entry in map(json.loads, (place / "alone/quarantine.jsonl").read_text().splitlines())
    }
    assert bad == (f"{place}/train.jsonl, line 8", "message 1: role is 'bot', not one of system, user, assistant, tool")
    for count, text in (("0", "at least 1"), ("-3", "at least 1")):
        with pytest.raises(UserError, match=text):
            evaluate([str(place / "alone"), "--examples", count])
    report = evaluate_checkpoint(place / "alone/checkpoints/step-00000006", files=None, examples=None)
    assert report["perplexity"] == pytest.approx(final["eval/perplexity"], rel=1e-4)
    checkpoint = place / "alone/checkpoints/step-00000006"
    calibration = Calibration.read(checkpoint)
    assert calibration.attributes.keys() == report["attributes"].keys()
    assert calibration.filter_note == report["filter"]
    assert calibration.filter_note in message
    assert Calibration.read(checkpoint.with_name("step-00000004")) is None
    assert evaluate([str(place / "alone"), "--calibrate", "0.5"]) == 0
    assert Calibration.read(checkpoint).false_refusals == 0.5
    assert manifest.problem_of(checkpoint) is None
    (_, pieces), *_ = trace(RunDirectory(place / "alone"), step=6, row=0)
    assert {piece.domain for piece in pieces} <= {"generative", "research", *ATTRIBUTES}
    assert all(piece.file == f"{place}/train.jsonl" for piece in pieces)
    for piece in pieces:
        assert "".join(part.text for part in piece.parts) == piece.text
        symbols = [part.symbol for part in piece.parts]
        assert "RESPONSE" in symbols
        assert [part.is_target for part in piece.parts] == sorted(part.is_target for part in piece.parts)
        targets = [part for part in piece.parts if part.is_target]
        if piece.domain in ATTRIBUTES:
            assert [(part.symbol, part.text) for part in targets] in ([(None, "0")], [(None, "1")])
            assert symbols[-2] == piece.domain.upper()
        else:
            assert len(targets) >= 1
    monkeypatch.setattr("sys.stdout", shown := io.StringIO())
    assert main(["where", str(place / "alone"), "--step", "6", "--row", "0"]) == 0
    assert "\n* " in shown.getvalue()
    assert "\n  RESPONSE" in shown.getvalue()


def test_a_start_gives_its_dimensions_and_tokenizer_and_refuses_others(place):
    config = Config.model_validate({"model": {"weights": str(place / "pretrained")}, "train": {"steps": 1}})
    found = with_initial_weights(config)
    assert {key: found.model.dimensions[key] for key in MODEL} == MODEL
    assert found.model.weights == str(place / "pretrained/model.safetensors")
    assert found.tokenizer.path == str(place / "pretrained/tokenizer.model")
    other = {"model": {"weights": str(place / "pretrained"), "d_model": 64}, "train": {"steps": 1}}
    with pytest.raises(UserError, match="d_model is 64, in its checkpoint 32; leave these model keys out"):
        with_initial_weights(Config.model_validate(other))


def test_ratings_of_one_class_alone_are_null_for_a_program_and_named_for_a_person(place, tmp_path, capsys):
    entry = {"role": "assistant", "content": "", "labels": {"unsafe": 0}}
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [entry]}) + "\n")
    words = [str(place / "pretrained"), "--files", str(tmp_path / "one.jsonl")]
    assert evaluate([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (report["loss"], report["perplexity"], report["tokens"]) == (None, None, 0)
    assert report["attributes"]["unsafe"]["auc_interval"] == [None, None]
    assert evaluate(words) == 0
    shown = capsys.readouterr().out
    assert "responses: none" in shown
    assert "only one class" in shown
    assert "nan" not in shown


def test_a_diverged_model_is_given_no_figures(place, tmp_path):
    diverged = shutil.copytree(place / "pretrained", tmp_path / "diverged")
    weights = load_file(diverged / "model.safetensors")
    save_file({**weights, "final_norm.scale": weights["final_norm.scale"] * nan}, diverged / "model.safetensors")
    with pytest.raises(NotFiniteError, match="diverged"):
        evaluate_checkpoint(diverged, files=[str(place / "val.jsonl")], examples=None)


def test_files_that_are_named_empty_are_not_the_runs_own(place):
    with pytest.raises(UserError):
        evaluate_checkpoint(place / "pretrained", files=[""], examples=None)


def test_a_perplexity_that_no_number_holds_is_infinite():
    assert DialogScores(nats=1e6, targets=10, ratings={}).metrics()["eval/perplexity"] == inf
