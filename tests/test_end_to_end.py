"""Whole runs through DeepSpeed's launcher, as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lamda.config.loading import load_config
from lamda.data.corpus import fingerprint, open_corpus, packing_of
from lamda.data.loader import Loader, batch_digest, row_digest
from lamda.data.prepare import main as prepare_command
from lamda.data.row_cache import RowCache
from lamda.data.tokenizer import Tokenizer
from lamda.interop.harness.command import main as evaluate_command
from lamda.runs.trace import main as trace_command
from lamda.storage.metrics import read_metrics
from tests.conftest import make_text, write_shard
from tests.interop.conftest import write_tasks
from tests.launch import run_deepspeed, run_ranks
from tests.wandb_run import environment
from tests.wandb_server import WandbServer

SETTINGS = """
model: {vocab_size: 400, d_model: 32, n_layers: 2, n_heads: 2, d_head: 16, d_ff: 64}
data: {sequence_length: 32}
train: {steps: 12, global_batch_size: 8, micro_batch_size: 2, lr: 1e-2, warmup_steps: 3}
checkpoint: {every: 4, keep: 9}
eval: {every: 6, batches: 20}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text of two domains and a configuration; `arguments(run, ...)` of a run in it."""
    folder = tmp_path_factory.mktemp("end-to-end")
    for file, domain in enumerate(["speech", "letters", "speech"]):
        texts = [make_text(50 * file + n, 40 + 29 * n) for n in range(24)]
        write_shard(folder / "train" / f"{file}.jsonl.zst", texts, domain=domain)
    write_shard(folder / "val-0.jsonl", [make_text(900 + n, 60) for n in range(4)], domain="speech")
    write_shard(folder / "val-1.jsonl", [make_text(950 + n, 60) for n in range(4)], domain="letters")
    (folder / "run.yaml").write_text(
        f"{SETTINGS}".replace(
            "data: {", f"data: {{corpus: standard_library, files: '{folder}/train/*', eval_files: '{folder}/val-*', "
        )
    )
    return folder


def arguments(place, run, *more):
    return ["scripts/pretrain.py", "--config", str(place / "run.yaml"), "--run.dir", str(place / run), *more]


def rows(place, run):
    return read_metrics(place / run / "metrics.jsonl")


def column(place, run, name):
    return [row[name] for row in rows(place, run)]


@pytest.fixture(scope="module")
def straight(place):
    """An unbroken run on two ranks, through the launcher."""
    done = run_deepspeed(arguments(place, "straight"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_run_trains_evaluates_saves_and_shows_a_sample(place, straight):
    run = place / "straight"
    found = rows(place, "straight")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert found[-1]["tokens"] == 12 * 8 * 32
    assert found[-1]["samples"] == 12 * 8
    assert {"eval/loss", "eval/bits_per_byte", "eval/loss/speech", "eval/loss/letters"} <= found[5].keys()
    assert {"eval/loss", "eval/bits_per_byte"} <= found[-1].keys()
    for row in found:
        parts = [
            (row[f"loss/{name}"], row[f"tokens/{name}"]) for name in ("speech", "letters") if f"loss/{name}" in row
        ]
        assert sum(targets for _, targets in parts) == 8 * 32
        assert sum(loss * targets for loss, targets in parts) / (8 * 32) == pytest.approx(row["loss"], rel=1e-6)
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000012"
    names = {path.name for path in (run / "checkpoints" / "step-00000012").iterdir()}
    assert names == {
        "manifest.json", "run_state.json", "model.safetensors", "config.yaml", "start.json", "tokenizer.model",
        "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors",
    }  # fmt: skip
    assert (run / "samples" / "step-00000012.txt").read_text("utf-8")
    assert not [*run.glob("lock*.json")]
    for shown in ("step 1/12", "ETA", "bits/byte", "xz -9", "to continue, run the same command"):
        assert shown in straight.stdout


SECRETS = {"WANDB_API_KEY": "canary0key0" * 4, "HF_TOKEN": "hf_canarytoken", "SLURM_JWT": "canaryjwt"}


@pytest.fixture(scope="module")
def broken(place, straight, tmp_path_factory):
    """Two ranks to step 12, whose last checkpoint is then damaged, and one from step 8 on; W&B is watching.

    Returns W&B, and all that the two runs said.
    """
    tasks = write_tasks(place / "tasks")
    flags = ("--checkpoint.every", "8", "--wandb.mode", "online", "--eval.tasks", "local_choice,local_rolling")
    flags += ("--eval.tasks_path", str(tasks), "--eval.tasks_every", "5", "--eval.tasks_limit", "3")
    home = tmp_path_factory.mktemp("home")
    with WandbServer() as server:
        variables = {**environment(home), **SECRETS, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url}
        first = run_deepspeed(arguments(place, "broken", *flags), ranks=2, variables=variables)
        assert first.returncode == 0, first.stderr[-3000:]
        last = place / "broken" / "checkpoints" / "step-00000012" / "model.safetensors"
        with last.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        (place / "broken" / "order.jsonl").unlink()
        (resumed,) = run_ranks(arguments(place, "broken", *flags), world_size=1, variables=variables)
    return server, first, resumed


def test_stopping_resuming_and_other_ranks_change_no_bit(place, broken):
    _, _, resumed = broken
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "step-00000012 is damaged" in resumed.stderr
    assert "continuing from" in resumed.stdout
    assert "step-00000008" in resumed.stdout
    assert (place / "broken" / "checkpoints" / "step-00000012.damaged").is_dir()
    for name in ("batch_digest", "loss", "eval/loss"):
        expected = [row[name] for row in rows(place, "straight") if name in row]
        assert [row[name] for row in rows(place, "broken") if name in row] == expected, name
    weights = [
        (place / run / "checkpoints/step-00000012/model.safetensors").read_bytes() for run in ("straight", "broken")
    ]
    assert weights[0] == weights[1]
    void = read_metrics(place / "broken" / "metrics.discarded.jsonl")
    assert [row["step"] for row in void] == [9, 10, 11, 12]


def test_the_windows_that_a_checkpoint_brings_are_kept_for_lamda_where(place, broken):
    state = json.loads((place / "broken" / "checkpoints" / "step-00000008" / "run_state.json").read_text())
    kept = [json.loads(line) for line in (place / "broken" / "order.jsonl").read_text().splitlines()]
    assert kept[: len(state["order"])] == [{"source": n, **order} for n, order in enumerate(state["order"])]


def test_tasks_have_their_own_cadence_and_change_neither_order_nor_weights(place, broken):
    """That losses, digests and weights are those of a run without tasks: see the test before."""
    server, first, resumed = broken
    scored = {
        row["step"]: row["eval/local_choice/acc"] for row in rows(place, "broken") if "eval/local_choice/acc" in row
    }
    assert list(scored) == [5, 10, 12]
    assert all(value * 3 == pytest.approx(round(value * 3)) for value in scored.values()), "three examples"
    last = rows(place, "broken")[-1]
    assert 0 < last["eval/local_rolling/bits_per_byte"] < 20
    assert f"eval/local_rolling/bits_per_byte {last['eval/local_rolling/bits_per_byte']:.4f}" in resumed.stdout
    assert "Building" not in first.stderr + resumed.stderr
    (run,) = server.runs.values()
    assert {row["_step"] for row in run.history if "eval/local_choice/acc" in row} == {5, 10, 12}


def test_a_resumed_run_is_one_run_in_w_and_b_with_each_step_once(place, broken):
    """Rows that were made void are sent again only where W&B lacks them: they are the same."""
    server, _, _ = broken
    (run,) = server.runs.values()
    assert run.steps == list(range(1, 13))
    assert [row["loss"] for row in run.history] == pytest.approx(column(place, "broken", "loss"))


def test_no_secret_is_kept_said_or_sent(place, broken):
    server, *runs = broken
    kept = {path: path.read_bytes() for path in (place / "broken").rglob("*") if path.is_file()}
    assert {path.name for path in kept} >= {"train.log", "config.yaml", "status.json", "metrics.jsonl"}
    assert any(path.suffix == ".wandb" for path in kept)
    said = [text.encode() for run in runs for text in (run.stdout, run.stderr)]
    for secret in SECRETS.values():
        assert not [path for path, content in kept.items() if secret.encode() in content]
        assert not [text for text in (*said, *server.received) if secret.encode() in text]


def test_evaluate_agrees_with_the_runs_last_evaluation(place, straight, capsys):
    assert evaluate_command([str(place / "straight"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    last = rows(place, "straight")[-1]
    assert report["loss"] == pytest.approx(last["eval/loss"], abs=2e-3)
    assert report["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], abs=2e-3)
    assert report["domains"]["speech"]["loss"] == pytest.approx(last["eval/loss/speech"], abs=2e-3)
    everything = b"".join(path.read_bytes() for path in sorted(place.glob("val-*.jsonl")))
    texts = [json.loads(line)["text"] for line in everything.splitlines()]
    assert report["bytes"] == sum(len(text.encode()) for text in texts)


def test_where_tells_the_text_of_a_row(place, straight, capsys):
    assert trace_command([str(place / "straight"), "--step", "7", "--json"]) == 0
    message = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["row"] for each in message] == list(range(8))
    tokenizer = Tokenizer.load(place / "straight" / "tokenizer.model")
    digests = []
    for each in message:
        ids = []
        for piece in each["pieces"]:
            lines = (
                zstandard.ZstdDecompressor().decompressobj().decompress(Path(piece["file"]).read_bytes()).splitlines()
            )
            document = [*tokenizer.encode(json.loads(lines[piece["line"] - 1])["text"]), tokenizer.end_of_document]
            ids += document[piece["first"] : piece["last"] + 1]
        digests.append(row_digest(np.array(ids, np.uint32)))
    assert batch_digest(np.stack(digests)) == rows(place, "straight")[6]["batch_digest"]


def all_tokens(table):
    return int(re.search(r"^all +[\d,]+ +([\d,]+)", table, re.MULTILINE)[1].replace(",", ""))


def test_rows_that_two_shards_prepare_give_the_same_samples(place, straight, capsys):
    flags = ["--config", str(place / "run.yaml"), "--data.cache_dir", str(place / "blocks")]
    flags += ["--tokenizer.path", str(place / "straight" / "tokenizer.model")]
    code = "import sys; from lamda.data.prepare import main; sys.exit(main(sys.argv[1:]))"
    second = [sys.executable, "-c", code, "--shard", "2/2", *flags, "--run.dir", str(place / "other")]
    with subprocess.Popen(second, stdout=subprocess.PIPE, text=True) as process:
        assert prepare_command(["--shard", "1/2", *flags, "--run.dir", str(place / "prepared")]) == 0
        message = capsys.readouterr().out
        own, other = map(all_tokens, (message, process.communicate()[0]))
    assert own > 0
    assert other > 0
    assert "bytes/token" in message
    assert "cuts: pieces that continue" in message
    assert prepare_command(["--json", *flags, "--run.dir", str(place / "prepared")]) == 0
    both = json.loads(capsys.readouterr().out)
    assert sum(both["tokens"].values()) == own + other
    config = load_config(flags)
    corpus, tokenizer = open_corpus(config.data), Tokenizer.load(config.tokenizer.path)
    row_cache = RowCache.of(config.data.cache_dir, fingerprint(corpus, config, tokenizer))
    kept = {path.parent.name for path in row_cache.path.glob("*/*.rows")}
    assert kept == {f"lane-{lane.index:04}" for lane in corpus.lanes}
    loader = Loader(
        corpus,
        tokenizer,
        packing=packing_of(config),
        seed=config.run.seed,
        batch=8,
        micro_batch=8,
        rank=0,
        world_size=1,
        row_cache=row_cache,
    )
    with loader:
        found = [
            batch_digest(step.digests[np.argsort(step.positions)]) for _, step in zip(range(12), loader, strict=False)
        ]
    assert found == column(place, "straight", "batch_digest")


def test_a_finished_run_says_so_and_changes_nothing(place, straight):
    status = place / "straight" / "status.json"
    before = {path: path.stat().st_mtime_ns for path in (place / "straight").rglob("*") if path.is_file()}
    said = status.read_bytes()
    (again,) = run_ranks(arguments(place, "straight"), world_size=1)
    assert again.returncode == 0
    assert "finished, 12 steps" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in (place / "straight").rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {place / "straight" / "train.log", status}
    assert status.read_bytes() == said
