"""A run rolls back to a checkpoint that is sound, and sets the others aside."""

import pytest

from lamda.config.errors import UserError
from lamda.storage import commit, manifest
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.anomalies import find_sound, set_aside_rolled_back

BATCH = 8


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


def save(directory, step, *, skipped=(), consumed=None):
    final = directory.checkpoints / f"step-{step:08d}"
    temporary = directory.checkpoints / f".{final.name}.tmp"
    commit.make_fresh(temporary)
    consumed = BATCH * step if consumed is None else consumed
    RunState(step=step, consumed=consumed, skipped=tuple(skipped)).write(temporary / "run_state.json")
    files = {"run_state.json": commit.sync_and_describe(temporary / "run_state.json")}
    commit.commit(temporary, final, {"step": step, "files": files}, keep=99)
    return final


def names(directory):
    return sorted(path.name for path in directory.checkpoints.glob("step-*"))


@pytest.mark.parametrize(
    ("saved", "first", "noted", "expected"),
    [
        ((9, 12), 20, [], 12),
        ((9, 12), 14, [], 12),
        ((9, 12), 13, [], 9),  # the weights of step 12 gave the spike of step 13
        ((9, 12), 12, [], 9),  # refused steps change nothing: step 12's weights are step 11's
        ((12,), 13, [], 12),  # there is no other
        ((3, 6, 9), 4, [], 3),  # none is older: the oldest
        ((6, 9, 12), 20, [(96, 160)], 9),  # the run rolled back to step 12 before
        ((6, 9, 12), 20, [(96, 160), (72, 160)], 6),
        ((6, 9), 20, [(72, 160), (48, 160)], 6),
    ],
)
def test_a_run_rolls_back_to_the_newest_checkpoint_that_nothing_speaks_against(
    directory, world, saved, first, noted, expected
):
    for step in saved:
        save(directory, step)
    for window in noted:
        directory.note_skipped(window, step=first, reason="a test")
    assert manifest.step_of(find_sound(directory, first=first, world=world)) == expected


def test_a_damaged_checkpoint_is_passed_over(directory, world):
    older, newer = save(directory, 3), save(directory, 6)
    (newer / "run_state.json").write_text((newer / "run_state.json").read_text() + " ")
    assert find_sound(directory, first=20, world=world) == older


def test_only_checkpoints_that_have_seen_skipped_samples_are_set_aside(directory):
    for step in (6, 9, 12):
        save(directory, step)
    directory.note_skipped((48, 80), step=10, reason="a test")
    set_aside_rolled_back(directory)
    assert names(directory) == ["step-00000006", "step-00000009.spoilt", "step-00000012.spoilt"]
    assert (directory.checkpoints / "LATEST").read_text() == "step-00000006"
    save(directory, 9, skipped=[(48, 80)], consumed=104)
    set_aside_rolled_back(directory)
    assert names(directory)[1] == "step-00000009"
    directory.note_skipped((48, 112), step=12, reason="a test")
    set_aside_rolled_back(directory)
    assert names(directory)[:3] == ["step-00000006", "step-00000009.1.spoilt", "step-00000009.spoilt"]


@pytest.mark.parametrize(
    "text", ["{", "{}", '""', "null", "[[5, 9]]", '[{"from": "5", "to": 9}]', '[{"from": 5.5, "to": 9}]',
             '[{"from": 9, "to": 5}]', '[{"from": -5, "to": 9}]', '[{"from": 5}]'],
)  # fmt: skip
def test_windows_that_were_broken_by_hand_are_never_taken_for_none(directory, text):
    file = directory.path / "skipped.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"skipped\.json: cannot be read .*run_state\.json"):
        directory.skipped()
    assert file.read_text() == text
