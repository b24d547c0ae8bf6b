"""`lamda checkpoint ls | show | verify | diff` say what is in checkpoints, by files that this test wrote itself."""

import json
import os
import time

import pytest
import torch

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.runs import checkpoint_diff, checkpoint_ls, checkpoint_show, checkpoint_verify
from lamda.runs.checkpoints import find_checkpoint, find_checkpoints
from lamda.storage import commit, manifest
from tests.runs.conftest import save_checkpoint


@pytest.fixture
def run(tmp_path, weights):
    """Checkpoints of steps 5, 10 and 15, and a damaged one of step 20 that was set aside."""
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path / "run", step, weights(step))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000020").rename(folder / "step-00000020.damaged")
    return tmp_path / "run"


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08}"


def message(capsys, command, *arguments, code=0):
    """What a command says in JSON, after checking its exit code."""
    assert command.main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_name_is_a_checkpoint_a_run_or_a_step_of_a_run(run):
    assert find_checkpoint(str(checkpoint(run, 5))) == checkpoint(run, 5)
    assert find_checkpoint(str(run)) == checkpoint(run, 15)
    assert find_checkpoint(f"{run}@10") == checkpoint(run, 10)
    assert find_checkpoints(str(run)) == [checkpoint(run, step) for step in (5, 10, 15)]
    assert find_checkpoints(f"{run}@10") == [checkpoint(run, 10)]


@pytest.mark.parametrize("name", ["run@7", "run@x", "nowhere", "nowhere@5", "run/checkpoints/step-00000099"])
def test_a_name_of_nothing_is_reported(run, monkeypatch, name):
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"has no checkpoint of step|no checkpoint here"):
        find_checkpoint(name)


def test_ls_shows_every_checkpoint_and_which_stay_or_are_damaged(run, capsys):
    (run / "config.yaml").write_text("train: {steps: 99}\ncheckpoint: {keep_every: 10}\n")
    (checkpoint(run, 5) / "model.safetensors").write_bytes(b"short")
    os.utime(checkpoint(run, 15) / "manifest.json", (time.time() - 3600,) * 2)
    found = message(capsys, checkpoint_ls, run)
    assert [each["step"] for each in found] == [5, 10, 15, 20]
    assert [each["kept"] for each in found] == [False, True, False, True]
    assert "model.safetensors has 5 bytes instead of" in found[0]["problem"]
    assert (found[1]["problem"], found[3]["problem"]) == (None, "set aside when the run resumed")
    assert found[1]["bytes"] == sum(file.stat().st_size for file in checkpoint(run, 10).iterdir())
    assert 3600 <= found[2]["age_seconds"] < 3700
    assert checkpoint_ls.main([str(run)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "step", "size", "ranks", "ZeRO", "age", "state"]
    assert lines[1].split()[-5:] == ["0s", "complete,", "kept", "for", "good"]
    assert lines[2].split()[-2:] == ["1h00m", "complete"]


def test_ls_of_a_run_without_checkpoints_says_so(tmp_path, capsys):
    assert message(capsys, checkpoint_ls, tmp_path) == []
    checkpoint_ls.main([str(tmp_path)])
    assert "no checkpoint here" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_ls.main([str(tmp_path / "none")])


def test_show_tells_state_tensors_and_what_was_configured(tmp_path, weights, capsys):
    config = Config(model={"preset": "tiny"}, train={"steps": 40, "lr": 0.5})
    path = save_checkpoint(tmp_path, 10, weights(0), config=config, ranks=2, updates=9, skipped=[[80, 88]])
    found = message(capsys, checkpoint_show, path)
    assert found["state"]["samples"] == 80
    assert found["configuration"] == {"model.preset": "tiny", "train.steps": 40, "train.lr": 0.5}
    assert list(found["tensors"])[-2:] == ["layers.2.scale", "layers.10.scale"]
    assert found["tensors"]["embedding.weight"] == {"shape": [7, 5], "dtype": "BF16"}
    assert checkpoint_show.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "10",
        "9 (1 steps skipped)",
        "80 to 87",
        "55 in 5 tensors",
        "by 2 ranks, ZeRO stage 1",
        "BF16, 4 times",
    ):
        assert line in text


def test_show_tells_the_code_and_the_machines_that_wrote_it(tmp_path, weights, capsys):
    path = save_checkpoint(tmp_path, 10, weights(0))
    start = {
        "lamda": "0.1.0",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "packages": {"torch": "2.13.0", "numpy": "2.4"},
        "hosts": {"AMD EPYC, 64 cores": 2, "Intel Xeon, 8 cores": 1},
    }
    (path / "start.json").write_text(json.dumps(start))
    assert message(capsys, checkpoint_show, path)["start"] == start
    assert checkpoint_show.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "code             lamda 0.1.0, commit 0123456789ab with changes, torch 2.13.0" in lines
    assert "machines         2 x (AMD EPYC, 64 cores); 1 x (Intel Xeon, 8 cores)" in lines


def test_what_an_older_version_did_not_record_is_shown_as_missing(tmp_path, weights, capsys):
    paths = [save_checkpoint(tmp_path / name, 5, weights(0), ranks=1) for name in "ab"]
    for path in paths:
        content = json.loads((path / "manifest.json").read_text())
        kept = {name: {"size": entry["size"]} for name, entry in content["files"].items()}
        (path / "manifest.json").write_text(json.dumps({"step": 5, "files": kept}))
        (path / "run_state.json").write_text('{"step": 5}')
    assert checkpoint_show.main([str(paths[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ago, deepspeed" in lines[1]
    shown = {name: line.removeprefix(name).strip() for line in lines for name in ("updates", "tokens") if name in line}
    assert shown == {"updates": "- (- steps skipped)", "tokens": "-"}
    assert message(capsys, checkpoint_diff, *paths)["optimizer"] == "unknown"


def test_a_checkpoint_of_another_framework_is_reported_by_its_name(tmp_path, weights, capsys):
    """It has no ZeRO stage, and keeps the optimizer state in files of its own."""
    paths = [save_checkpoint(tmp_path / name, 5, weights(0), ranks=0) for name in "ab"]
    for path in paths:
        (path / "state" / "d").mkdir(parents=True)
        (path / "state" / "d" / "0").write_bytes(b"moments")
        content = json.loads((path / "manifest.json").read_text())
        content["files"]["state/d/0"] = commit.sync_and_describe(path / "state" / "d" / "0")
        del content["zero_stage"], content["sha256"]
        (path / "manifest.json").write_text(manifest.sealed({**content, "ranks": 1, "framework": "flax"}))
    assert checkpoint_ls.main([str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-4:-2] == ["1", "flax"]
    (found,) = message(capsys, checkpoint_ls, tmp_path / "a")
    assert (found["framework"], found["zero_stage"], found["problem"]) == ("flax", None, None)
    assert found["bytes"] == sum(file.stat().st_size for file in paths[0].rglob("*") if file.is_file())
    assert checkpoint_show.main([str(paths[0])]) == 0
    assert "by 1 rank, flax" in capsys.readouterr().out
    (verdict,) = message(capsys, checkpoint_verify, paths[0])
    assert verdict["problem"] is None
    assert verdict["bytes"] == found["bytes"] - (paths[0] / "manifest.json").stat().st_size
    assert message(capsys, checkpoint_diff, *paths)["optimizer"] == "unknown"
    (paths[0] / "state" / "d" / "0").unlink()
    (found,) = message(capsys, checkpoint_ls, tmp_path / "a")
    assert found["problem"] == "state/d/0 is missing"


def test_verify_accepts_what_training_committed(tmp_path, capsys):
    temporary, final = tmp_path / "checkpoints" / ".step-00000003.tmp", checkpoint(tmp_path, 3)
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": commit.sync_and_describe(temporary / "model.safetensors")}
    commit.commit(temporary, final, {"step": 3, "files": files}, keep=1)
    (verdict,) = message(capsys, checkpoint_verify, tmp_path)
    assert (verdict["checkpoint"], verdict["bytes"], verdict["problem"]) == (str(final), 7, None)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-00000-of-00001.safetensors", "manifest.json"])
def test_verify_finds_what_has_changed_and_changes_nothing(run, capsys, name):
    file = checkpoint(run, 10) / name
    content = bytearray(file.read_bytes())
    content[content.index(b'"ranks": 1') + 9 if name == "manifest.json" else -1] ^= 3
    file.write_bytes(content)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    problems = [verdict["problem"] for verdict in message(capsys, checkpoint_verify, run, code=1)]
    assert problems[::2] == [None, None]
    assert problems[1].startswith(f"{name} has changed since it was written")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert checkpoint_verify.main([str(run)]) == 1
    assert f"damaged, {name} has changed" in capsys.readouterr().out


def test_verify_finds_a_file_that_is_gone(run, capsys):
    (checkpoint(run, 15) / "run_state.json").unlink()
    (verdict,) = message(capsys, checkpoint_verify, f"{run}@15", code=1)
    assert verdict["problem"] == "run_state.json is missing"


def test_a_checkpoint_that_a_running_run_prunes_is_no_damage(run, monkeypatch, capsys):
    original = manifest.problem_of

    def prune(path, **part):
        if path == checkpoint(run, 5) and path.exists():
            commit.remove(path)
        return original(path, **part)

    monkeypatch.setattr(manifest, "problem_of", prune)
    verdicts = message(capsys, checkpoint_verify, run)
    assert [verdict["problem"] for verdict in verdicts] == ["pruned meanwhile", None, None]


def test_a_checkpoint_differs_in_nothing_from_its_copy(tmp_path, weights, capsys):
    content = weights(0)
    content["embedding.weight"][0, 0] = torch.nan
    for name in ("a", "b"):
        save_checkpoint(
            tmp_path / name, 5, content, config=Config(run={"dir": name}, train={"steps": 9}), wandb_id=name
        )
    found = message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "b")
    assert found["same"]
    assert (found["weights"], found["optimizer"], found["state"], found["configuration"]) == ([], "same", {}, {})


def test_diff_tells_by_how_much_every_tensor_differs(tmp_path, weights, capsys):
    a, b = weights(0), weights(0)
    b["embedding.weight"] = a["embedding.weight"].clone()
    b["embedding.weight"][2, :3] += torch.tensor([0.5, -2.0, 1.0], dtype=torch.bfloat16)
    b["layers.0.scale"][1] = torch.inf
    b["layers.1.scale"] = a["layers.1.scale"].float()
    b["layers.2.scale"] = torch.ones(6).bfloat16()
    b["new"] = b.pop("layers.10.scale")
    save_checkpoint(tmp_path / "a", 5, a)
    save_checkpoint(tmp_path / "b", 5, b)
    found = message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "b", code=1)
    gaps = (a["embedding.weight"].double() - b["embedding.weight"].double()).abs()
    assert found["weights"] == [
        {"tensor": "embedding.weight", "what": "values", "largest": gaps.max().item(), "share": 3 / 35},
        {"tensor": "layers.0.scale", "what": "values", "largest": None, "share": 0.2},
        {"tensor": "layers.1.scale", "what": "type BF16 and F32", "largest": 0.0, "share": 0.0},
        {"tensor": "layers.2.scale", "what": "shape [5] and [6]", "largest": None, "share": None},
        {"tensor": "layers.10.scale", "what": "only in A", "largest": None, "share": None},
        {"tensor": "new", "what": "only in B", "largest": None, "share": None},
    ]


def test_large_tensors_are_compared_in_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_diff, "CHUNK_ELEMENTS", 7)
    a = torch.arange(30.0).view(3, 10)
    b = a.clone()
    b[0, 3], b[2, 9] = 4.0, 31.5
    save_checkpoint(tmp_path / "a", 5, {"w": a})
    save_checkpoint(tmp_path / "b", 5, {"w": b})
    (difference,) = message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "b", code=1)["weights"]
    assert (difference["largest"], difference["share"]) == (2.5, 2 / 30)


def test_diff_tells_state_configuration_and_optimizer(tmp_path, weights, capsys):
    lr = [Config(train={"steps": 9, "lr": rate}) for rate in (1e-3, 2e-3)]
    save_checkpoint(tmp_path / "a", 5, weights(0), config=lr[0], fingerprint={"seed": 0})
    save_checkpoint(tmp_path / "b", 5, weights(0), config=lr[1], fingerprint={"seed": 1}, optimizer=b"others")
    save_checkpoint(tmp_path / "c", 5, weights(0), config=lr[0], fingerprint={"seed": 0}, ranks=2)
    found = message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "b", code=1)
    assert found["state"] == {"fingerprint.seed": [0, 1]}
    assert found["configuration"] == {"train.lr": [1e-3, 2e-3]}
    assert (found["weights"], found["optimizer"]) == ([], "different")
    save_checkpoint(tmp_path / "d", 5, weights(0), config=lr[0], fingerprint={"seed": 0}, optimizer=b"others")
    assert not message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "d", code=1)["same"]
    on_two = message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "c")
    assert (on_two["same"], on_two["optimizer"]) == (True, "unknown")
    assert checkpoint_diff.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    for line in (
        "weights: the same",
        "optimizer state: different",
        "  train.lr: 0.001 and 0.002",
        "state: 1 keys differ",
    ):
        assert line in text


def test_a_key_that_an_older_checkpoint_did_not_have_counts_as_its_default(tmp_path, weights, capsys):
    for name in ("a", "b"):
        path = save_checkpoint(tmp_path / name, 5, weights(0), config=Config(train={"steps": 9}))
    lines = (path / "config.yaml").read_text().splitlines()
    (path / "config.yaml").write_text("\n".join(line for line in lines if "z_loss" not in line))
    assert message(capsys, checkpoint_diff, tmp_path / "a", tmp_path / "b")["configuration"] == {}


def test_the_text_of_a_long_difference_is_cut(tmp_path, weights, capsys):
    many = {f"layers.{n}.scale": torch.full((3,), float(n)) for n in range(40)}
    save_checkpoint(tmp_path / "a", 5, many)
    save_checkpoint(tmp_path / "b", 5, {name: tensor + 1 for name, tensor in many.items()})
    assert checkpoint_diff.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "weights: 40 tensors differ" in text
    assert "and 10 more (--json has all)" in text
    assert len([line for line in text.splitlines() if line.startswith("layers.")]) == 30


@pytest.mark.parametrize("name", ["model.safetensors", "run_state.json", "config.yaml", "manifest.json"])
def test_what_cannot_be_read_is_named(run, name):
    (checkpoint(run, 15) / name).write_text("{[")
    for command, arguments in ((checkpoint_show, [run]), (checkpoint_diff, [f"{run}@10", run])):
        with pytest.raises(UserError, match=name):
            command.main(list(map(str, arguments)))
