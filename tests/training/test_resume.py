"""Where a run begins follows from checkpoint.resume and what is there; what does not fit is refused by name."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.config.schema import TrainConfig
from lamda.storage import manifest
from lamda.storage.commit import commit, make_fresh, sync_and_describe
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training import resume as resuming
from lamda.training.resume import ResumePoint
from tests.storage.copies import copies

MODEL = {"vocab_size": 97, "d_model": 24, "n_layers": 3, "n_heads": 3, "d_head": 8, "d_ff": 40}


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


def find_resume_point(config, directory, world, framework="deepspeed"):
    return resuming.find_resume_point(config, directory, world, framework=framework)


def config(resume, mirror=None, **model):
    checkpoint = {"resume": str(resume), "mirror": mirror and str(mirror)}
    return Config(model={**MODEL, **model}, train={"steps": 10}, checkpoint=checkpoint)


def save(directory, step, *, without="", start=None, **named):
    """without: a key that the version which wrote it did not know. start: the record of the start that wrote it."""
    final = directory.checkpoints / f"step-{step:08d}"
    temporary = directory.checkpoints / f".{final.name}.tmp"
    make_fresh(temporary)
    RunState(step=step).write(temporary / "run_state.json")
    lines = to_yaml(config("auto")).splitlines(keepends=True)
    (temporary / "config.yaml").write_text("".join(line for line in lines if not without or without not in line))
    if start is not None:
        (temporary / "start.json").write_text(json.dumps(start))
    files = {file.name: sync_and_describe(file) for file in temporary.iterdir()}
    dimensions = config("auto").model.dimensions
    commit(temporary, final, {"step": step, "model": dimensions, **named, "files": files}, keep=9)
    return final


def damage(path):
    (path / "run_state.json").write_bytes(b"{}")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_directory_starts_from_nothing(directory, world, resume):
    assert find_resume_point(config(resume), directory, world) == ResumePoint(None, RunState())


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_the_newest_valid_checkpoint_is_taken(directory, world, resume):
    older, newer = save(directory, 2), save(directory, 4)
    assert find_resume_point(config(resume), directory, world) == ResumePoint(newer, RunState(step=4))
    damage(newer)
    assert find_resume_point(config(resume), directory, world) == ResumePoint(older, RunState(step=2))


def test_required_refuses_a_directory_without_checkpoint(directory, world):
    with pytest.raises(UserError, match=r"checkpoint\.resume required: .* holds no complete checkpoint"):
        find_resume_point(config("required"), directory, world)


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_damaged_checkpoints_alone_never_start_a_run_again(directory, world, resume):
    damage(save(directory, 2))
    for _ in range(3):
        with pytest.raises(UserError, match="every checkpoint is damaged"):
            find_resume_point(config(resume), directory, world)


@pytest.mark.parametrize("away", ["moved", "removed", "not-mounted"])
def test_checkpoints_that_are_away_never_start_a_run_over(directory, world, tmp_path, away):
    save(directory, 2)
    directory.note_checkpoint(2)
    directory.checkpoints.rename(tmp_path / "elsewhere")
    if away == "not-mounted":
        directory.checkpoints.mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="has no checkpoint, but step-00000002 was saved here"):
            find_resume_point(config("auto"), directory, world)
    if away == "not-mounted":
        directory.checkpoints.rmdir()
    if away != "removed":
        (tmp_path / "elsewhere").rename(directory.checkpoints)
        assert find_resume_point(config("auto"), directory, world).state.step == 2


def test_a_damaged_checkpoint_comes_from_the_mirror(directory, world, tmp_path):
    directory.tokenizer.touch()
    with copies(directory, str(tmp_path / "mirror")):
        good = [save(directory, step) for step in (2, 4)]
    newer = save(directory, 6)
    mirrored = config("auto", mirror=tmp_path / "mirror")
    for damaged, step in (([*good[1:], newer], 4), ([*good, newer], 4)):
        for path in damaged:
            damage(path)
        assert find_resume_point(mirrored, directory, world).state.step == step
        assert manifest.complete(directory.checkpoints)[-1] == good[1]
        newer.mkdir(exist_ok=True)
    assert {path.name for path in manifest.set_aside(directory.checkpoints)} >= {
        "step-00000004.damaged",
        "step-00000006.damaged",
    }


def test_rows_that_are_gone_are_reported(directory, world, caplog):
    save(directory, 2)
    find_resume_point(config("auto"), directory, world)
    assert caplog.messages == [f"{directory.metrics} is gone: the rows up to step 2 are missing"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(directory, world):
    directory.metrics.write_text('{"step": 1, "loss": 3.0}\n')
    directory.checkpoints.mkdir()
    assert find_resume_point(config("auto"), directory, world) == ResumePoint(None, RunState())


def test_other_settings_of_training_are_reported_in_one_line_each(directory, world, caplog):
    save(directory, 2)
    directory.metrics.touch()
    find_resume_point(config("auto"), directory, world)
    assert caplog.messages == []
    train = TrainConfig(steps=20, lr=2e-5, schedule="wsd", micro_batch_size=2)
    find_resume_point(config("auto").model_copy(update={"train": train}), directory, world)
    assert caplog.messages == ["train.lr 0.0003 -> 2e-05 from step 3 on", "train.schedule cosine -> wsd from step 3 on"]


def test_a_checkpoint_from_before_each_part_had_its_rate_is_reported(directory, world, caplog):
    save(directory, 2, without="norm_lr_scale")
    directory.metrics.touch()
    find_resume_point(config("auto"), directory, world)
    (line,) = caplog.messages
    assert line.startswith("from step 3 on: rates of query, norms and bias tables")


def test_another_computation_is_rejected_unless_it_is_accepted_by_name(directory, world, caplog):
    ds_config = directory.path / "bf16.json"
    ds_config.write_text('{"bf16": {"enabled": true}}')
    save(directory, 2, start={"deepspeed": {"bf16": {"enabled": False}}})
    directory.metrics.touch()

    def changed(*accepted):
        return Config(
            model=MODEL,
            data={"document_mask": True},
            train={"steps": 10, "fp8": True},
            checkpoint={"accept_changed": accepted or None},
            deepspeed={"config": str(ds_config)},
        )

    with pytest.raises(UserError) as caught:
        find_resume_point(changed(), directory, world)
    assert str(caught.value).endswith(
        "the model would compute something else: data.document_mask False -> True; train.fp8 False -> True; bf16 False "
        "-> True. Restore these settings, or accept the change by name: --checkpoint.accept_changed "
        "data.document_mask,train.fp8,bf16"
    )
    with pytest.raises(UserError, match=r"something else: bf16 False -> True\. "):
        find_resume_point(changed("data.document_mask", "train.fp8"), directory, world)
    assert find_resume_point(changed("data.document_mask", "train.fp8", "bf16"), directory, world).state.step == 2
    assert "data.document_mask False -> True from step 3 on" in caplog.messages
    with pytest.raises(UserError, match=r"something else: data\.document_mask False -> True"):
        find_resume_point(Config(model=MODEL, data={"packing": "whole"}, train={"steps": 10}), directory, world)


def test_a_name_that_is_not_accepted_is_an_error():
    with pytest.raises(ValidationError, match=r"'document_mask' is none of .*; did you mean 'data.document_mask'"):
        Config(train={"steps": 10}, checkpoint={"accept_changed": ["document_mask"]})


@pytest.mark.parametrize("trace", ["metrics", "checkpoint"])
def test_never_refuses_a_directory_that_holds_a_run(directory, world, trace):
    if trace == "metrics":
        directory.metrics.touch()
    else:
        save(directory, 2)
    with pytest.raises(UserError, match=r"checkpoint\.resume never: .* already holds a run; choose another run\.dir"):
        find_resume_point(config("never"), directory, world)


def test_a_path_is_taken_from_another_run(directory, world, tmp_path):
    path = save(RunDirectory(tmp_path / "other"), 6)
    assert find_resume_point(config(path), directory, world) == ResumePoint(path, RunState(step=6))


def test_a_path_that_is_not_there_is_reported_with_the_words_that_are(directory, world, tmp_path):
    with pytest.raises(UserError, match=r"no such checkpoint \(nor one of auto, required, never\)"):
        find_resume_point(config(tmp_path / "nowhere"), directory, world)


def test_a_run_in_place_of_a_checkpoint_is_refused_with_the_checkpoints_name(directory, world, tmp_path):
    path = save(RunDirectory(tmp_path / "other"), 6)
    with pytest.raises(UserError, match=rf"is a run; name one of its checkpoints, such as {path}$"):
        find_resume_point(config(tmp_path / "other"), directory, world)


def test_a_damaged_path_is_refused_and_left_in_place(directory, world, tmp_path):
    path = save(RunDirectory(tmp_path / "other"), 6)
    damage(path)
    with pytest.raises(UserError, match=r"checkpoint\.resume .*run_state\.json has 2 bytes"):
        find_resume_point(config(path), directory, world)
    assert path.is_dir()


def test_going_back_behind_newer_checkpoints_is_refused(directory, world):
    older = save(directory, 2)
    save(directory, 4)
    with pytest.raises(UserError, match=r"holds newer checkpoints \(step-00000004\).*choose another run\.dir"):
        find_resume_point(config(older), directory, world)


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_another_model_is_refused_by_what_differs(directory, world, resume):
    path = save(directory, 2)
    wanted = config(path if resume == "path" else resume, d_ff=48, bias_per_layer=False)
    with pytest.raises(UserError) as caught:
        find_resume_point(wanted, directory, world)
    assert "d_ff is 40, the configuration says 48; bias_per_layer is True, the configuration says False" in str(
        caught.value
    )
    assert "d_model" not in str(caught.value)


@pytest.mark.parametrize("named", [{}, {"optimizer": "adamw"}])
def test_a_checkpoint_of_another_optimizer_is_refused_with_the_way_on(directory, world, named):
    """One that names none is of the time when there was but AdamW."""
    path = save(directory, 2, **named)
    assert find_resume_point(config("auto"), directory, world).path == path
    muon = config("auto").model_copy(update={"train": TrainConfig(steps=10, optimizer="muon")})
    with pytest.raises(UserError, match=r"adamw.*Set train\.optimizer adamw.*model\.weights .*model\.safetensors"):
        find_resume_point(muon, directory, world)


@pytest.mark.parametrize(
    ("named", "there", "wanted"),
    [
        ({}, "deepspeed", "flax"),
        ({"framework": "deepspeed"}, "deepspeed", "flax"),
        ({"framework": "flax"}, "flax", "deepspeed"),
    ],
)
def test_a_checkpoint_of_another_framework_is_refused_with_the_way_on(directory, world, named, there, wanted):
    """One that names none is of the time when there was but DeepSpeed."""
    path = save(directory, 2, **named)
    assert find_resume_point(config("auto"), directory, world, framework=there).path == path
    for resume in ("auto", path):
        with pytest.raises(UserError) as caught:
            find_resume_point(config(resume), directory, world, framework=wanted)
        assert f"{path} was written by {there}; {wanted} cannot resume from it. Continue with {there}" in str(
            caught.value
        )
        assert f"model.weights {path}/model.safetensors and another run.dir" in str(caught.value)


@pytest.mark.parametrize(("named", "before"), [({"attention": "sdpa"}, "sdpa"), ({}, "math"), ({}, "auto")])
def test_another_attention_backend_is_reported_in_one_line(directory, named, before):
    """The manifest names it; an early one does not, but its config.yaml may."""
    path, settings = save(directory, 2, **named), config("auto", attention="auto" if named else before)
    if before == "auto":
        assert resuming.backend_change(path, settings, attention="fused") == []
        return
    (line,) = resuming.backend_change(path, settings, attention="fused")
    assert f"attention: fused, but {path} was trained with {before}" in line
    assert resuming.backend_change(path, settings, attention=before) == []
    assert resuming.backend_change(path, settings, attention=None) == []


SAVED = {"seed": 0, "shuffle": 8, "tokenizer": "a" * 64, "files": [["x", 1]]}


def start(fingerprint):
    return ResumePoint(Path("step-3"), RunState(step=3, fingerprint=fingerprint))


def test_the_same_data_continues():
    assert start(SAVED).check_data(dict(SAVED)) == start(SAVED).state


def test_a_new_run_takes_the_data_that_is_there():
    assert ResumePoint(None, RunState()).check_data(SAVED) == RunState(fingerprint=SAVED)


def test_a_checkpoint_that_does_not_say_what_its_order_depends_on_is_refused():
    current = {**SAVED, "format": 2}
    with pytest.raises(UserError, match=r"^step-3: its samples are in the order of another version \(format None"):
        start({}).check_data(current)


@pytest.mark.parametrize(
    ("current", "message"),
    [
        ({**SAVED, "seed": 1, "shuffle": 9}, "seed was 0, is 1; shuffle was 8, is 9. Restore"),
        ({**SAVED, "packing": "concat"}, "packing was None, is concat. Restore"),
        ({key: value for key, value in SAVED.items() if key != "shuffle"}, "shuffle was 8, is None. Restore"),
        ({**SAVED, "tokenizer": "b" * 64}, f"tokenizer was {'a' * 57}..., is {'b' * 57}.... Restore"),
        ({**SAVED, "files": [["x", 1], ["y", 2]]}, "files gained ['y', 2]. Restore"),
        ({**SAVED, "files": [["x", 3]]}, "files lost ['x', 1] and gained ['x', 3]. Restore"),
        (
            {**SAVED, "tokenizer": "a" * 63 + "b"},
            f"tokenizer was ...{'a' * 57}, is ...{'a' * 56}b. Restore",
        ),
    ],
)
def test_other_data_is_refused_by_what_differs(current, message):
    with pytest.raises(UserError) as caught:
        start(SAVED).check_data(current)
    assert f"the data differs from the checkpoint: {message}" in str(caught.value)


def test_an_earlier_name_of_a_key_is_the_same_setting(directory, world, caplog, monkeypatch):
    renamed = to_yaml(config("auto")).replace("  max_rollbacks:", "  rollbacks:")
    monkeypatch.setitem(globals(), "to_yaml", lambda _: renamed)
    save(directory, 2)
    directory.metrics.touch()
    train = TrainConfig(steps=10, max_rollbacks=7)
    find_resume_point(config("auto").model_copy(update={"train": train}), directory, world)
    assert caplog.messages == ["train.max_rollbacks 3 -> 7 from step 3 on"]
