"""The loop and all that it needs know no framework; what knows DeepSpeed loads it by the time it is needed."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT

TRAINING = sorted(path.stem for path in (ROOT / "lamda/training").glob("*.py"))
MODULES = [f"lamda.training.{name}" for name in TRAINING]


@pytest.mark.parametrize(
    "modules",
    [["lamda.training.setup"], [*MODULES, "lamda.engines.deepspeed.framework", "lamda.dialog.finetuning"]],
    ids=["setup", "each"],
)
def test_a_run_is_imported_without_deepspeed(modules):
    code = "import importlib, sys\n"
    code += f"for name in {modules}: importlib.import_module(name)\n"
    code += "sys.exit('deepspeed' in sys.modules or 'lamda.engines.deepspeed.engine' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_checked_early_needs_no_torch():
    code = "import sys, lamda.launch.main, lamda.launch.pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_path):
    return Place.make(tmp_path_factory.mktemp("plain"), tokenizer_path)


def train(place, run, *more, fault="", script=("-m", "tests.training.plain_framework")):
    variables = {"LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": fault}
    flags = ["--config", str(place.folder / "run.yaml"), "--run.dir", str(place.folder / run), "--eval.every", "5"]
    flags += more
    environment = {**os.environ, **ENVIRONMENT, **variables}
    return subprocess.run(
        [sys.executable, *script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def straight(place):
    done = train(place, "straight")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows_of(place, run):
    return read_metrics(place.folder / run / "metrics.jsonl")


def test_another_framework_trains_evaluates_saves_and_shows_a_sample_in_the_same_loop(place, straight):
    rows = rows_of(place, "straight")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[-1]["eval/loss"] < rows[4]["eval/loss"]
    assert rows[0]["model_flops_per_second"] == pytest.approx(1e12 * rows[0]["mfu"])
    newest = place.folder / "straight" / "checkpoints" / "step-00000010"
    assert manifest.problem_of(newest) is None
    message = manifest.read(newest)
    assert manifest.framework_of(message) == "plain"
    assert sorted(message["files"]) == [
        "config.yaml", "model.safetensors", "run_state.json", "start.json", "state/moments.safetensors",
        "tokenizer.model",
    ]  # fmt: skip
    assert "sample:\n" in straight.stdout


def test_killed_in_a_save_it_continues_exactly(place, straight):
    assert train(place, "killed", fault="save.written:kill:0:6").returncode == -9
    assert len(rows_of(place, "killed")) < 10
    assert train(place, "killed").returncode == 0
    starts = (place.folder / "killed" / "starts.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0, 3]
    for name in ("loss", "batch_digest"):
        assert [row[name] for row in rows_of(place, "killed")] == [row[name] for row in rows_of(place, "straight")]


def test_a_run_whose_disk_is_lost_continues_exactly_from_its_mirror(place, straight):
    run, mirror = place.folder / "lost", place.folder / "mirror"
    stopped = train(place, "lost", "--checkpoint.mirror", str(mirror), fault="forward:term:0:6")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    status = json.loads((run / "status.json").read_text("utf-8"))
    newest = manifest.name_of(status["step"])
    assert (status["mirror"]["copied"], status["mirror"]["problem"]) == (newest, None)
    shutil.rmtree(run)
    done = train(place, "lost", "--checkpoint.mirror", str(mirror))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"fetching {newest} from {mirror}/lost" in done.stderr
    for name in ("step", "loss", "batch_digest"):
        assert [row[name] for row in rows_of(place, "lost")] == [row[name] for row in rows_of(place, "straight")]
    ends = [
        place.folder / name / "step-00000010" for name in ("straight/checkpoints", "lost/checkpoints", "mirror/lost")
    ]
    files = [manifest.read(end)["files"] for end in ends]
    for name in ("model.safetensors", "state/moments.safetensors"):
        assert files[0][name] == files[1][name] == files[2][name]


def test_a_step_that_is_not_finite_is_refused_and_reported(place, straight):
    assert train(place, "spoiled", fault="loss:nan:0:5").returncode == 0
    assert [row["skipped_steps"] for row in rows_of(place, "spoiled")][3:6] == [0, 1, 1]


def test_deepspeed_does_not_continue_from_its_checkpoint(place, straight):
    refused = train(place, "straight", script=("scripts/pretrain.py",))
    assert refused.returncode == 2
    assert "was written by plain; deepspeed cannot resume from it. Continue with plain" in refused.stderr
