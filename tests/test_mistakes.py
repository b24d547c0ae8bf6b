"""A user's mistake is answered with a clear sentence and exit code 2, and nothing of a run is touched."""

import json
from pathlib import Path

import pytest

from tests.conftest import make_text, write_shard
from tests.launch import run_ranks

WORKER = str(Path(__file__).parent / "distributed" / "mistakes_worker.py")
BASE = {
    "model.vocab_size": "400", "model.d_model": "16", "model.n_layers": "1", "model.n_heads": "1", "model.d_head": "8",
    "model.d_ff": "16", "data.corpus": "standard_library", "data.sequence_length": "16",
    "train.steps": "2", "train.global_batch_size": "4", "train.micro_batch_size": "2", "wandb.mode": "disabled",
}  # fmt: skip


FINISHED = '{"status": "finished", "time": 1.0, "step": 2, "steps": 2}'


def flags(changes):
    return [part for key, value in {**BASE, **changes}.items() for part in (f"--{key}", str(value))]


def snapshot(run):
    return {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "train.log"
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("mistakes")
    text = write_shard(folder / "text.jsonl", [make_text(n, 200) for n in range(20)])
    words = write_shard(folder / "words.jsonl", ["of the"] * 3)
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "other.jsonl").write_bytes(b'{"content": "of the"}\n')
    (folder / "file").write_bytes(b"")
    good = {"data.files": text, "data.eval_files": text, "tokenizer.path": tokenizer_path, "run.dir": folder / "run"}
    fresh = iter(range(99))
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "checkpoints").write_bytes(b"")  # listing it fails, for root too
    (folder / "unreadable" / "status.json").write_text(FINISHED)

    def case(**changes):
        chosen = {
            **good,
            "run.dir": folder / f"fresh-{next(fresh)}",
            **{k.replace("__", "."): v for k, v in changes.items()},
        }
        return flags(chosen)

    cases = {
        "good": flags(good),
        "unknown key": [*case(), "--train.learning_rat", "1"],
        "missing file": case(data__files=folder / "nothing*.jsonl"),
        "empty corpus": case(data__files=folder / "empty.jsonl"),
        "small corpus": case(data__files=words, train__global_batch_size=400),
        "vocabulary": case(model__vocab_size=500),
        "too few words for a tokenizer": case(data__files=words, tokenizer__path="null", train__steps=1),
        "unwritable": case(run__dir=folder / "file" / "run"),
        "other model": flags({**good, "model.d_ff": 32, "train.steps": 4}),
        "other data": flags({**good, "run.seed": 7, "train.steps": 4}),
        "never": flags({**good, "checkpoint.resume": "never"}),
        "required": case(checkpoint__resume="required"),
        "no such checkpoint": case(checkpoint__resume=folder / "nowhere"),
        "no validation text": case(
            data__corpus=card_without_validation(folder, text), data__eval_files="null", data__held_out=0, eval__every=1
        ),
        "own text alone": case(data__eval_files="null", data__held_out=0, eval__every=1),
        "validation without a document": case(data__eval_files=folder / "empty.jsonl"),
        "validation under another key": case(data__eval_files=folder / "other.jsonl"),
        "bad validation": case(data__eval_files=folder / "nothing.jsonl"),
        "no tasks": case(eval__tasks="copa", eval__tasks_path=folder / "nowhere"),
        "unreadable": flags({**good, "run.dir": folder / "unreadable"}),
        "missing weights": case(model__weights=folder / "nothing.safetensors"),
        "other weights": case(
            model__weights=folder / "run/checkpoints/step-00000002/model.safetensors", model__d_ff=32
        ),
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    (rank,) = run_ranks([WORKER, str(folder / "cases.json"), str(folder / "results.json")], world_size=1)
    assert rank.returncode == 0, rank.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert results["good"][0] == 0, results["good"]
    return results, folder


def card_without_validation(folder, text):
    path = folder / "card.yaml"
    path.write_text(
        f"name: c\ndescription: d\nsources: [{{name: s, license: none, files: '{text}', domain: meta.pile_set_name}}]\n"
    )
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown key", "--train.learning_rat"),
        ("missing file", "nothing*.jsonl"),
        ("empty corpus", "empty.jsonl"),
        ("small corpus", "fewer than one batch"),
        ("vocabulary", "has 400 pieces, but model.vocab_size is 500"),
        ("too few words for a tokenizer", "model.vocab_size"),
        ("unwritable", "choose another"),
        ("other model", "another model: d_ff is 16, the configuration says 32"),
        ("other data", "seed was 0, is 7"),
        ("never", "already holds a run"),
        ("required", "holds no complete checkpoint"),
        ("no such checkpoint", "no such checkpoint"),
        ("no validation text", "has no validation text"),
        ("own text alone", "set data.eval_files to files that are not trained on, or --eval.every null"),
        ("validation without a document", "empty.jsonl: holds no document"),
        ("validation under another key", "its keys are 'content'"),
        ("bad validation", "nothing.jsonl"),
        ("no tasks", "there is no such folder of task files"),
        ("missing weights", "nothing.safetensors"),
        ("other weights", "of another shape"),
    ],
)
def test_a_mistake_is_reported_in_a_sentence(answers, name, message):
    code, _, err = answers[0][name]
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_mistakes_leave_an_existing_run_as_it_was(answers):
    _, folder = answers
    run = folder / "run"
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["LATEST", "step-00000002"]


def test_checkpoints_that_cannot_be_read_now_are_a_failure_that_changes_nothing_of_the_run(answers):
    code, _, err = answers[0]["unreadable"]
    assert code == 1  # `lamda supervise` tries again; a mistake would be refused each time
    assert "checkpoints: cannot be read now (Not a directory)" in err
    assert "Traceback" not in err
    run = answers[1] / "unreadable"
    assert json.loads((run / "status.json").read_text()) == json.loads(FINISHED)
    assert (run / "checkpoints").read_bytes() == b""
