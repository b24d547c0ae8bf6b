"""A checkpoint is complete or it is not there: every damage is found, and the one before is taken."""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.distributed import World
from lamda.storage import commit as checkpoints
from lamda.storage.commit import commit, find_valid, make_fresh, require_none, sweep, sync_and_describe, verify
from lamda.storage.manifest import MANIFEST, complete, read, read_state, sealed
from lamda.storage.reading import UnreadableError
from lamda.storage.state import RunState

MODEL = {"d_model": 24, "bias_per_layer": True}
CONTENT = {"model.safetensors": bytes(range(256)) * 3, "run_state.json": b'{"step": 1}', "empty": b""}


def name_of(step):
    return f"step-{step:08d}"


def save(folder, step, *, keep=10, files=CONTENT):
    temporary = folder / f".{name_of(step)}.tmp"
    make_fresh(temporary)
    for name, content in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(content)
    entries = {name: sync_and_describe(temporary / name) for name in files}
    commit(temporary, folder / name_of(step), {"step": step, "model": MODEL, "files": entries}, keep=keep)
    return folder / name_of(step)


def flip(file: Path, position: int, mask: int = 1):
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_committed_checkpoint_is_valid_and_named_by_latest(tmp_path, world):
    path = save(tmp_path, 20)
    assert verify(path, world=world) is None
    assert find_valid(tmp_path, world=world) == path
    assert read(path)["model"] == MODEL
    assert names(tmp_path) == ["LATEST", name_of(20)]
    assert (tmp_path / "LATEST").read_text() == name_of(20)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoints"), 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_anywhere_is_found(saved, world, data):
    file = saved / data.draw(st.sampled_from(["model.safetensors", "run_state.json", MANIFEST]))
    position = data.draw(st.integers(0, file.stat().st_size - 1))
    mask = data.draw(st.integers(1, 255))
    flip(file, position, mask)
    try:
        assert verify(saved, world=world) is not None
    finally:
        flip(file, position, mask)
    assert verify(saved, world=world) is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_file_is_found(saved, world, data):
    file = saved / data.draw(st.sampled_from(["model.safetensors", "run_state.json", MANIFEST]))
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        assert verify(saved, world=world) is not None
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_a_missing_file_is_named(tmp_path, world, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    assert name in verify(path, world=world)


def test_a_longer_file_is_named(tmp_path, world):
    path = save(tmp_path, 1)
    (path / "empty").write_bytes(b"x")
    assert verify(path, world=world) == "empty has 1 bytes instead of 0"


def test_files_in_subfolders_are_synced_with_their_folders_and_verified(tmp_path, world, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoints, "sync_folder", lambda path: synced.append(path.name))
    path = save(tmp_path, 1, files={**CONTENT, "state/d/0": b"numbers", "state/names": b"[]"})
    assert {"state", "d", f".{name_of(1)}.tmp"} <= set(synced)
    assert verify(path, world=world) is None
    flip(path / "state" / "d" / "0", 2)
    assert verify(path, world=world) == "state/d/0 has changed since it was written (sha256)"
    (path / "state" / "names").unlink()
    (path / "state" / "d" / "0").write_bytes(b"numbers")
    assert verify(path, world=world) == "state/names is missing"


@pytest.mark.parametrize(
    "name",
    ["../outside", "..", "state/../../outside", "state/../inside", "./inside", "state//inside", "inside/", "", ".",
     "{folder}/outside", "state\\\\inside", "..\\\\outside", "link", "state/link", "folder/outside", "circle", "nul\0"],
)  # fmt: skip
def test_a_name_that_leaves_the_folder_or_is_written_in_another_way_is_refused(tmp_path, world, name):
    name, temporary = name.format(folder=tmp_path), tmp_path / ".step-00000001.tmp"
    make_fresh(temporary)
    (temporary / "state").mkdir()
    for place in (tmp_path / "outside", temporary / "inside", temporary / "state" / "inside"):
        place.write_bytes(b"x")
    for link in (temporary / "link", temporary / "state" / "link"):
        link.symlink_to(tmp_path / "outside")
    (temporary / "folder").symlink_to(tmp_path)
    (temporary / "circle").symlink_to(temporary / "circle")
    entry = sync_and_describe(tmp_path / "outside")
    commit(temporary, tmp_path / name_of(1), {"step": 1, "model": MODEL, "files": {name: entry}}, keep=1)
    message = verify(tmp_path / name_of(1), world=world)
    assert message in (f"{MANIFEST} lists {name!r}, which is not a file inside the checkpoint", f"{name} is missing")
    assert message.startswith(MANIFEST) or name == "circle"


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", "{}", "[" * 9999, '{"files": {}}', '{"files": 3, "sha256": ""}']
)
def test_a_manifest_of_another_shape_is_damage(tmp_path, world, content):
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(content)
    assert MANIFEST in verify(path, world=world)


def test_every_rank_hashes_its_share_of_the_files(tmp_path, world):
    path = save(tmp_path, 1)
    found = []
    for name in ("model.safetensors", "run_state.json"):
        flip(path / name, 5)
        found.append([verify(path, world=World(rank=rank, world_size=3)) is not None for rank in range(3)])
        flip(path / name, 5)
    assert sorted(map(sum, found)) == [1, 1]
    assert found[0] != found[1]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, world, caplog):
    for step in (10, 20, 30):
        save(tmp_path, step)
    flip(tmp_path / name_of(30) / "model.safetensors", 700)
    (tmp_path / name_of(20) / "run_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_valid(tmp_path, world=world) == tmp_path / name_of(10)
    assert names(tmp_path) == ["LATEST", name_of(10), f"{name_of(20)}.damaged", f"{name_of(30)}.damaged"]
    assert [record.args[0].name for record in caplog.records] == [name_of(30), name_of(20)]
    assert "model.safetensors has changed" in caplog.messages[0]
    assert f"renamed to {name_of(30)}.damaged, trying the one before it" in caplog.messages[0]
    assert "run_state.json is missing" in caplog.messages[1]
    assert (tmp_path / "LATEST").read_text() == name_of(10)


def test_a_step_may_be_damaged_again_and_again(tmp_path, world):
    save(tmp_path, 10)
    for _ in range(3):
        flip(save(tmp_path, 20) / MANIFEST, 0)
        assert find_valid(tmp_path, world=world) == tmp_path / name_of(10)
    assert len([name for name in names(tmp_path) if name.endswith(".damaged")]) == 3
    assert [path.name for path in complete(tmp_path)] == [name_of(10)]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path, world):
    """Nor does it at the second try, or the third: the refusal leaves everything as it is."""
    for step in (10, 20):
        shutil.copy(save(tmp_path, step) / "run_state.json", tmp_path / name_of(step) / "empty")
    before = names(tmp_path)
    for _ in range(3):
        with pytest.raises(UserError, match=r"every checkpoint is damaged .*step-00000020: empty has 11 bytes"):
            find_valid(tmp_path, world=world)
        assert names(tmp_path) == before


@pytest.mark.parametrize("noted", [None, 20])
@pytest.mark.parametrize("kind", ["new", "damaged", "latest", "link", "copy"])
def test_a_folder_that_held_checkpoints_and_has_none_is_not_taken_for_a_new_one(tmp_path, kind, noted):
    folder = tmp_path / "checkpoints"
    if kind == "link":
        folder.symlink_to(tmp_path / "not-mounted")
    elif kind != "new":
        folder.mkdir()
    if kind == "damaged":
        (folder / f"{name_of(20)}.damaged").mkdir()
    elif kind == "latest":
        (folder / "LATEST").write_text(name_of(20))
    elif kind == "copy":
        (folder / "step-best").mkdir()
    if noted is None and kind in ("new", "copy"):
        require_none(folder, noted=noted)
    else:
        with pytest.raises(UserError, match=r"does not start over by itself.*another run\.dir"):
            require_none(folder, noted=noted)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("place", ["model.safetensors", "run_state.json", MANIFEST, "folder"])
def test_what_cannot_be_read_now_is_no_damage(tmp_path, world, monkeypatch, place, code):
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    before = names(tmp_path)

    def refuse(wanted, real):
        def opened(file, *rest, **more):
            if Path(file) == wanted:
                raise OSError(code, os.strerror(code), str(file))
            return real(file, *rest, **more)

        return opened

    with monkeypatch.context() as patched:
        if place == "folder":
            patched.setattr(os, "scandir", refuse(tmp_path, os.scandir))
        else:
            patched.setattr(os, "open", refuse(path / place, os.open))
            patched.setattr(Path, "open", refuse(path / place, Path.open))
        for _ in range(2):
            with pytest.raises(UnreadableError, match=f"{re.escape(os.strerror(code))}.*Nothing was changed"):
                find_valid(tmp_path, world=world)
    assert names(tmp_path) == before
    assert find_valid(tmp_path, world=world) == path


@pytest.mark.parametrize(
    "name", ["step-best", f"{name_of(20)}-mine", "step-20", "step-000000020", f"{name_of(20)}.old"]
)
def test_a_copy_under_another_name_is_neither_taken_nor_pruned(tmp_path, world, name):
    shutil.copytree(save(tmp_path, 20), tmp_path / name)
    for step in (30, 40):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == sorted(["LATEST", name_of(40), name])
    assert find_valid(tmp_path, world=world) == tmp_path / name_of(40)


def test_a_checkpoint_under_another_steps_name_is_refused_and_left(tmp_path, world):
    shutil.copytree(save(tmp_path, 20), tmp_path / name_of(50))
    before = names(tmp_path)
    with pytest.raises(UserError, match="is the checkpoint of step 20 under another name"):
        find_valid(tmp_path, world=world)
    assert names(tmp_path) == before


def test_a_link_to_a_checkpoint_that_is_away_is_no_damage(tmp_path, world):
    save(tmp_path, 10)
    (tmp_path / name_of(20)).symlink_to(tmp_path / "not-mounted")
    with pytest.raises(UnreadableError, match="a broken link"):
        find_valid(tmp_path, world=world)
    assert names(tmp_path) == ["LATEST", name_of(10), name_of(20)]


def reseal(path, change):
    content = read(path)
    del content["sha256"]
    change(content)
    (path / MANIFEST).write_text(sealed(content))


@pytest.mark.parametrize("entry", [[], {}, 3, None, {"size": 3}, {"sha256": "a"}])
def test_an_entry_of_another_shape_is_damage(tmp_path, world, entry):
    path = save(tmp_path, 1)
    reseal(path, lambda content: content["files"].update({"empty": entry}))
    assert verify(path, world=world) == f"{MANIFEST} has no size and sha256 of empty"


def test_a_pipe_in_the_place_of_the_manifest_is_not_waited_for(tmp_path, world):
    path = save(tmp_path, 1)
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    assert verify(path, world=world) == f"{MANIFEST} is missing"


def test_the_state_is_read_only_where_the_manifest_names_it_and_agrees(tmp_path):
    path = save(tmp_path, 1, files={"run_state.json": json.dumps(asdict(RunState(step=1))).encode()})
    assert read_state(path).step == 1
    reseal(path, lambda content: content.update(step=2))
    with pytest.raises(UserError, match=r"run_state\.json: is of step 1, but manifest\.json says 2"):
        read_state(path)
    reseal(path, lambda content: content["files"].clear())
    with pytest.raises(UserError, match=r"manifest\.json does not list run_state\.json"):
        read_state(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1, "more": 2}', "[" * 9999])
def test_a_state_of_another_version_is_refused_by_its_file(tmp_path, content):
    path = save(tmp_path, 1, files={"run_state.json": content.encode()})
    with pytest.raises(UserError, match=r"run_state\.json: is not a run state of this version"):
        read_state(path)


@pytest.mark.parametrize("made", [True, False])
def test_no_checkpoint_is_none(tmp_path, world, made):
    folder = tmp_path / "checkpoints"
    if made:
        folder.mkdir()
    assert find_valid(folder, world=world) is None


def test_the_newest_are_kept(tmp_path, world):
    for step in (2, 4, 10, 100, 1000):
        save(tmp_path, step, keep=2)
    assert [path.name for path in complete(tmp_path)] == [name_of(100), name_of(1000)]
    assert (tmp_path / "LATEST").read_text() == name_of(1000)
    assert find_valid(tmp_path, world=world).name == name_of(1000)


def test_what_a_crash_left_is_no_checkpoint_and_in_nobodys_way(tmp_path, world):
    save(tmp_path, 10)
    left = tmp_path / f".{name_of(20)}.tmp"
    shutil.copytree(tmp_path / name_of(10), left)
    (left / "from-a-rank-that-is-gone").write_bytes(b"x")
    assert find_valid(tmp_path, world=world).name == name_of(10)
    path = save(tmp_path, 20)
    assert find_valid(tmp_path, world=world) == path
    assert names(path) == sorted([*CONTENT, MANIFEST])
    assert names(tmp_path) == ["LATEST", name_of(10), name_of(20)]


def test_a_checkpoint_never_takes_the_place_of_another(tmp_path):
    first = save(tmp_path, 1)
    before = (first / MANIFEST).read_bytes()
    make_fresh(tmp_path / "new")
    with pytest.raises(OSError, match="not empty"):
        commit(tmp_path / "new", first, {"files": {}}, keep=1)
    assert (first / MANIFEST).read_bytes() == before


def test_every_kth_checkpoint_stays_for_good(tmp_path):
    for step in range(1, 13):
        temporary = tmp_path / f".{name_of(step)}.tmp"
        make_fresh(temporary)
        commit(temporary, tmp_path / name_of(step), {"files": {}}, keep=2, keep_every=4)
    assert [path.name for path in complete(tmp_path)] == [name_of(step) for step in (4, 8, 11, 12)]


def test_what_a_crash_left_is_swept_and_complete_checkpoints_stay(tmp_path):
    kept = save(tmp_path, 3)
    for leftover in (f".{name_of(4)}.tmp", f".{name_of(1)}.tmp"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert names(tmp_path) == ["LATEST", kept.name]


def test_the_manifest_is_json_that_lists_every_file_with_its_size(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / MANIFEST).read_text())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in CONTENT.items()
    }
