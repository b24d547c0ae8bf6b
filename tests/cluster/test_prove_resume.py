"""What `lamda test-resume` calls equal, on small made runs; a real one is in tests/faults."""

import json
import math
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from lamda.cluster.compare import FirstDifference, compare_checkpoints, compare_runs, optimizer_state_of, weights_of
from lamda.cluster.resume_test import ResumeTest, Trial, choose_ranks, main, rounding_hint, show_trials
from lamda.config import Config
from lamda.config.errors import UserError
from lamda.storage.run_directory import RunDirectory

SHAPES = {"embedding": 24, "blocks.0.gate": 15}
TINY = ["--config", "configs/tiny.yaml", "--train.global_batch_size", "8"]


def state_of(name, kind, step):
    """[n] fp32, the same for the same arguments."""
    draw = torch.Generator().manual_seed(hash((len(name), len(kind), step)))
    return torch.randn(SHAPES[name], generator=draw)


def make_run(path, *, cuts=(), steps=6, change=lambda step, tensors: None, rows=None):
    """A finished run with checkpoints at every second step, its state cut at `cuts` among as many ranks."""
    run = RunDirectory(path)
    for step in range(2, steps + 1, 2):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        tensors = {f"{n}|{k}": state_of(n, k, step) for n in SHAPES for k in ("weight", "exp_avg", "exp_avg_sq")}
        weights = {name: tensors[f"{name}|weight"].bfloat16() for name in SHAPES}
        tensors["weights"] = weights
        change(step, tensors)
        save_file(tensors.pop("weights"), folder / "model.safetensors")
        bounds = [0, *cuts, max(SHAPES.values())]
        for rank, (low, high) in enumerate(pairwise(bounds)):
            pieces = {f"{key}|{low}": whole[low:high].clone() for key, whole in tensors.items() if low < len(whole)}
            save_file(pieces, folder / f"optimizer-{rank:05d}-of-{len(bounds) - 1:05d}.safetensors")
    if rows is None:
        rows = [{"step": step, "loss": 1 / step, "batch_digest": f"{step:016x}"} for step in range(1, steps + 1)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def straight(tmp_path):
    return make_run(tmp_path / "straight")


def differing(found):
    return {name: difference for name, difference in found.items() if difference is not None}


def test_equal_runs_are_equal(straight, tmp_path):
    found = compare_runs(straight, make_run(tmp_path / "other"))
    assert found == dict.fromkeys(["loss", "samples", "weights", "optimizer state"])


@pytest.mark.parametrize("cuts", [(12,), (5, 9, 20)])
def test_how_the_ranks_shared_the_state_makes_no_difference(straight, tmp_path, cuts):
    assert not differing(compare_runs(straight, make_run(tmp_path / "other", cuts=cuts)))


def test_nor_does_which_rank_had_which_piece(straight, tmp_path):
    other = make_run(tmp_path / "other", cuts=(12,))
    for folder in other.checkpoints.iterdir():
        first, _ = sorted(folder.glob("optimizer-*"))
        first.rename(folder / "optimizer-00002-of-00002.safetensors")
    assert not differing(compare_runs(straight, other))


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_state_that_parts_is_reported_with_its_first_step_and_its_largest_distance(straight, tmp_path, kind):
    def change(step, tensors):
        if step >= 4:
            tensors[f"blocks.0.gate|{kind}"][13] += 0.25
            tensors[f"embedding|{kind}"][2] += 0.125

    found = differing(compare_runs(straight, make_run(tmp_path / "other", cuts=(12,), change=change)))
    assert found.keys() == {"optimizer state"}
    assert found["optimizer state"].step == 4
    assert found["optimizer state"].largest == pytest.approx(0.25, abs=1e-6)


def test_one_bit_of_one_weight_is_seen(straight, tmp_path):
    def change(step, tensors):
        if step == 6:
            tensors["weights"]["embedding"].view(torch.int16)[3] ^= 1

    found = differing(compare_runs(straight, make_run(tmp_path / "other", change=change)))
    assert found.keys() == {"weights"}
    assert found["weights"].step == 6
    assert 0 < found["weights"].largest < 0.02


def test_zeros_of_another_sign_are_not_equal(tmp_path):
    def with_zero(sign):
        return lambda step, tensors: tensors["embedding|exp_avg"].fill_(sign * 0.0)

    runs = [make_run(tmp_path / str(sign), change=with_zero(sign)) for sign in (1, -1)]
    assert differing(compare_runs(*runs)) == {"optimizer state": FirstDifference(2, 0.0)}


@pytest.mark.parametrize("spoil", ["nan", "dtype", "name", "shape"])
def test_what_no_distance_can_tell_still_differs(straight, tmp_path, spoil):
    def change(step, tensors):
        weights = tensors["weights"]
        if spoil == "nan":
            weights["embedding"][0] = math.nan
            weights["blocks.0.gate"] += 0.5
        elif spoil == "dtype":
            weights["embedding"] = weights["embedding"].view(torch.float16)
        elif spoil == "name":
            weights["another"] = weights.pop("embedding")
        else:
            weights["embedding"] = weights["embedding"][1:].clone()

    found = differing(compare_runs(straight, make_run(tmp_path / "other", change=change)))
    assert found.keys() == {"weights"}
    assert found["weights"].step == 2
    assert found["weights"].largest is None or spoil == "dtype"


def test_nan_in_both_is_equal(tmp_path):
    def change(step, tensors):
        tensors["weights"]["embedding"][0] = math.nan

    assert not differing(compare_runs(*(make_run(tmp_path / name, change=change) for name in "ab")))


def test_columns_part_at_the_first_step_that_differs(straight, tmp_path):
    rows = [{"step": step, "loss": 1 / step, "batch_digest": f"{step:016x}"} for step in range(1, 7)]
    rows[2]["batch_digest"] = "0" * 16
    rows[3]["loss"] += 0.5
    rows[5]["loss"] = None
    found = differing(compare_runs(straight, make_run(tmp_path / "other", rows=rows)))
    assert found == {"samples": FirstDifference(3), "loss": FirstDifference(4, pytest.approx(0.5))}


@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_missing_row_differs(straight, tmp_path, lost):
    rows = [{"step": step, "loss": None, "batch_digest": "x"} for step in range(1, 7)]
    runs = [make_run(tmp_path / "all", rows=rows), make_run(tmp_path / "fewer", rows=rows[:lost] + rows[lost + 1 :])]
    expected = {"loss": FirstDifference(lost + 1), "samples": FirstDifference(lost + 1)}
    assert differing(compare_runs(*runs)) == differing(compare_runs(*reversed(runs))) == expected


def test_state_with_a_gap_is_an_error_and_not_equal_to_its_like(tmp_path):
    runs = [make_run(tmp_path / name, cuts=(5, 9)) for name in "ab"]
    for run in runs:
        (run.checkpoints / "step-00000002" / "optimizer-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="not in the checkpoint"):
        compare_runs(*runs)


def test_state_of_another_framework_is_an_error_and_not_equal_to_its_like(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for folder in (run.checkpoints / f"step-{step:08d}" for run in runs for step in (2, 4, 6)):
        next(folder.glob("optimizer-*")).unlink()
        (folder / "manifest.json").write_text(json.dumps({"framework": "flax", "files": {}}))
    with pytest.raises(UserError, match=r"has no optimizer state of DeepSpeed \(flax\)"):
        compare_runs(*runs)


def test_runs_without_a_common_checkpoint_are_not_called_equal(straight, tmp_path):
    other = make_run(tmp_path / "other", steps=2)
    (other.checkpoints / "step-00000002").rename(other.checkpoints / "step-00000003")
    for read in (weights_of, optimizer_state_of):
        with pytest.raises(UserError, match="no checkpoint in common"):
            compare_checkpoints(straight.checkpoints, other.checkpoints, read)


def config_of(batch, micro):
    return Config.model_validate({"train": {"steps": 9, "global_batch_size": batch, "micro_batch_size": micro}})


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "others", "expected"),
    [
        (8, 8, None, (8, 4)),
        (8, 2, None, (2, 1)),
        (15, 5, None, (5, 1)),
        (45, 15, None, (15, 5)),
        (8, 1, None, (1, None)),
        (8, 1, 4, (1, 4)),
        (8, 2, 8, (2, 8)),
    ],
)
def test_the_other_number_of_ranks_can_share_the_batch(micro_batches, ranks, others, expected):
    assert choose_ranks(config_of(2 * micro_batches, 2), ranks=ranks, others=others) == expected


def test_without_a_gpu_there_are_two_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_ranks(config_of(8, 2), ranks=None, others=None) == (2, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_ranks(config_of(8, 2), ranks=None, others=None) == (4, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "3"], "cannot share 2 micro-batches"),
        (["--ranks", "2", "--others", "5"], "cannot share 2 micro-batches"),
        (["--ranks", "2", "--others", "2"], "give another number"),
        (["--ranks", "0"], "at least 1 rank"),
        (["--ranks", "2", "--steps", "3"], "at least 4 steps"),
        (["--ranks", "2", "--train.stepz", "3"], "did you mean 'train.steps'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_made(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main([*TINY, "--run.dir", str(tmp_path / "folder" / "run"), *flags])
    assert not (tmp_path / "folder").exists()


def test_the_table_has_a_line_for_each_thing_and_a_column_for_each_resumed_run(capsys):
    found = {"loss": None, "weights": FirstDifference(6, 1.25e-7), "samples": FirstDifference(3)}
    trials = [Trial(2, 4, "step-00000003", dict.fromkeys(found)), Trial(1, 7, "step-00000006", found)]
    show_trials(2, trials)
    assert capsys.readouterr().out.splitlines() == [
        "killed on 2 ranks, resumed  on 2 ranks  on 1 rank",
        "loss                        equal       equal",
        "weights                     equal       differs from step 6 by 1.25e-07 at most",
        "samples                     equal       differs from step 3",
    ]
    assert [trial.is_exact for trial in trials] == [True, False]
    assert json.loads(json.dumps(asdict(trials[1])))["differences"]["weights"] == {"step": 6, "largest": 1.25e-07}


def trial_of(ranks, **differences):
    names = ("loss", "samples", "weights", "optimizer state")
    return Trial(ranks, 7, "step-00000006", {name: differences.get(name) for name in names})


@pytest.mark.parametrize(
    ("micro_batches", "trials", "hinted"),
    [
        (4, [trial_of(2), trial_of(1, weights=FirstDifference(6, 1e-7))], True),
        (2, [trial_of(2), trial_of(1, weights=FirstDifference(6, 1e-7))], False),
        (4, [trial_of(2, weights=FirstDifference(6, 1e-7)), trial_of(1)], False),
        (4, [trial_of(2), trial_of(1, samples=FirstDifference(3), weights=FirstDifference(6, 1e-7))], False),
        (4, [trial_of(2), trial_of(1)], False),
    ],
)
def test_only_what_another_order_of_sums_explains_is_explained_by_it(micro_batches, trials, hinted):
    assert ("in another order" in rounding_hint(config_of(2 * micro_batches, 2), 2, trials)) is hinted


@pytest.mark.parametrize(
    ("difference", "more", "code", "kept"),
    [
        (None, [], 0, 0),
        (None, ["--keep"], 0, 1),
        (FirstDifference(6, 0.5), [], 1, 1),
        (FirstDifference(6), ["--json"], 1, 1),
    ],
)
def test_what_differs_is_kept_and_ends_with_1(tmp_path, monkeypatch, capfd, difference, more, code, kept):
    monkeypatch.setattr(ResumeTest, "run", lambda *_: [trial_of(1, weights=difference)])
    flags = [*TINY, "--run.dir", str(tmp_path / "run"), "--ranks", "2"]
    assert main([*flags, *more]) == code
    message = capfd.readouterr().out
    assert len(list(tmp_path.iterdir())) == kept
    assert all(str(path) in message for path in tmp_path.iterdir())
    assert (
        json.loads(message)["exact"] is False
        if "--json" in more
        else ("nothing differs" in message) == (difference is None)
    )


def test_a_run_that_fails_shows_the_end_of_its_log_and_stays(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    flags = [*TINY, "--run.dir", str(tmp_path / "run"), "--ranks", "2"]
    with pytest.raises(UserError, match=r"(?s)run 1 of 3 failed \(exit code 0\).*straight.log.*--train.steps=12"):
        main(flags)
    (folder,) = tmp_path.iterdir()
    assert (folder / "straight.log").exists()
    assert "run 1 of 3: uninterrupted on 2 ranks" in capfd.readouterr().err
