"""A save holds the state of the moment it began, and one that fails changes nothing but the log."""

import gc
import shutil
import threading
import time
from collections import namedtuple
from contextlib import nullcontext
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lamda import durable
from lamda.config.errors import UserError
from lamda.distributed import World
from lamda.engines.deepspeed import checkpoint
from lamda.engines.deepspeed.checkpoint import flat_buffers, local_state, model_weights
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.storage import commit, manifest
from lamda.storage.lock import LostLockError
from lamda.storage.state import RunState
from lamda.training import saver as saving
from lamda.training.saver import Saver
from tests.distributed.engine_worker import batch, config

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def engine(tmp_path_factory, device):
    engine = DeepSpeedEngine(
        config({"stage": 1, "bf16": True}, tmp_path_factory.mktemp("own"), 0), world=World(), device=device
    )
    engine.initialize_weights()
    return engine


@pytest.fixture
def saver(tmp_path, engine):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    return Saver(tmp_path / "checkpoints", engine=engine, tokenizer=tmp_path / "tokenizer.model")


@pytest.fixture
def held(monkeypatch):
    """Files are synced only when the event is set."""
    event, sync = threading.Event(), saving.sync_and_describe

    def wait(file, **more):
        assert event.wait(60)
        return sync(file, **more)

    monkeypatch.setattr(saving, "sync_and_describe", wait)
    return event


def copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors}


def test_steps_continue_while_it_is_written_and_it_holds_the_state_it_began_with(saver, engine, held):
    before = copy(local_state(engine.deepspeed)), copy(model_weights(engine.deepspeed))
    assert saver.begin(RunState(step=1)) is None
    for step in range(3):
        engine.train_step(batch(step, World()), lr=1e-2)
    assert saver.completed_parts == 0
    assert saver.advance(saver.completed_parts) is None, "nobody waits for a rank that has not settled"
    held.set()
    saved = saver.finish()
    assert (saved.step, saved.problem) == (1, None)
    engine.load_checkpoint(saved.path)
    for old, new in zip(
        before, (copy(local_state(engine.deepspeed)), copy(model_weights(engine.deepspeed))), strict=True
    ):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_it_ends_by_the_ranks_sums_alone_and_once(saver):
    """As in the loop: the sum comes with a step, and each part of a save ends at one."""
    assert saver.begin(RunState(step=1)) is None
    end = time.monotonic() + 60
    while (saved := saver.advance(saver.completed_parts)) is None:
        assert time.monotonic() < end
    assert (saved.step, saved.problem) == (1, None)
    assert saver.advance(saver.completed_parts) is None
    assert saver.begin(RunState(step=2)) is None
    assert saver.finish().step == 2
    assert saver.finish() is None


def test_a_write_that_fails_is_reported_leaves_nothing_and_the_next_save_is_whole(saver, tmp_path):
    assert saver.begin(RunState(step=1)) is None
    assert saver.finish().problem is None
    away = (tmp_path / "tokenizer.model").rename(tmp_path / "away")
    assert saver.begin(RunState(step=2)) is None
    failed = saver.finish()
    assert failed.problem == "rank 0 cannot write (No such file or directory)"
    assert sorted(path.name for path in failed.path.parent.iterdir()) == ["LATEST", "step-00000001"]
    away.rename(tmp_path / "tokenizer.model")
    assert saver.begin(RunState(step=3)) is None
    assert manifest.problem_of(saver.finish().path) is None


def test_a_defect_of_our_own_in_the_thread_is_reported_too(saver, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", lambda *given, **more: [][1])
    assert saver.begin(RunState(step=1)) is None
    assert saver.finish().problem == "rank 0 failed (IndexError: list index out of range)"


def test_what_it_asks_room_for_is_what_it_writes(saver, engine):
    assert saver.begin(RunState(step=1)) is None
    files = [file for file in saver.finish().path.iterdir() if file.suffix == ".safetensors"]
    assert len(files) == 2
    assert engine.checkpoint_bytes() == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_files_in_subfolders_are_part_of_the_checkpoint(saver, engine, monkeypatch):
    def copy(folder):
        def write():
            file = folder / "state" / "deep" / "numbers"
            file.parent.mkdir(parents=True)
            file.write_bytes(b"123")
            return [file]

        return write

    monkeypatch.setattr(engine, "snapshot", copy)
    assert saver.begin(RunState(step=1)) is None
    path = saver.finish().path
    assert manifest.read(path)["files"]["state/deep/numbers"]["size"] == 3
    assert manifest.problem_of(path) is None
    (path / "state" / "deep" / "numbers").write_bytes(b"124")
    assert manifest.problem_of(path) == "state/deep/numbers has changed since it was written (sha256)"


def test_nothing_is_copied_before_there_is_room(saver, engine, monkeypatch):
    """Host memory for a copy that cannot be written would be taken for nothing."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 0))
    monkeypatch.setattr(engine, "snapshot", lambda folder: pytest.fail("copied"))
    assert "are free" in saver.begin(RunState(step=1)).problem


def test_without_room_it_does_not_begin(saver, monkeypatch, tmp_path):
    assert saver.begin(RunState(step=1)) is None
    size = sum(file.stat().st_size for file in saver.finish().path.iterdir() if file.suffix == ".safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * size, 9 * size, 1.1 * size))
    message = saver.begin(RunState(step=2))
    assert "needs 1.2 times its size" in message.problem
    assert saver.finish() is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * size, 8 * size, 1.3 * size))
    assert saver.begin(RunState(step=2)) is None
    assert saver.finish().problem is None


def test_a_folder_that_cannot_be_made_is_reported(saver, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    assert saver.begin(RunState(step=1)).problem == f"cannot write to {tmp_path}/checkpoints (Not a directory)"


def test_a_run_that_another_process_has_taken_over_saves_no_more(tmp_path, engine):
    """Neither begins a save, whose folder may be the other's, nor commits the one under way."""
    calls = []

    def require_lock():
        calls.append("lock")
        if len(calls) >= lost_at:
            raise LostLockError("lock gone")

    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    saver = Saver(
        tmp_path / "checkpoints",
        engine=engine,
        tokenizer=tmp_path / "tokenizer.model",
        require_lock=require_lock,
        sync_rows=lambda: calls.append("rows"),
    )
    lost_at = 4
    assert saver.begin(RunState(step=1)) is None
    assert saver.finish().problem is None
    assert calls == ["lock", "lock", "rows"]
    with pytest.raises(LostLockError):
        saver.begin(RunState(step=2))
    lost_at = len(calls) + 2
    assert saver.begin(RunState(step=3)) is None
    with pytest.raises(LostLockError):
        saver.finish()
    assert [path.name for path in manifest.complete(tmp_path / "checkpoints")] == ["step-00000001"]


def test_a_save_that_is_waited_for_tells_its_progress_while_its_files_grow_alone(tmp_path, engine, monkeypatch, held):
    """A disk that stands still is a hang, one that is slow is none."""
    monkeypatch.setattr(saving, "POLL_SECONDS", 0.01)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    message: list[None] = []
    saver = Saver(
        tmp_path / "checkpoints",
        engine=engine,
        tokenizer=tmp_path / "tokenizer.model",
        progress=lambda: message.append(None),
    )
    assert saver.begin(RunState(step=1)) is None
    waiting = threading.Thread(target=saver.finish)
    waiting.start()
    until_still(message)
    before = len(message)
    (tmp_path / "checkpoints" / ".step-00000001.tmp" / "piece").write_bytes(bytes(1 << 16))
    end = time.monotonic() + 60
    while len(message) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    until_still(message)
    held.set()
    waiting.join(60)
    assert not waiting.is_alive()


def until_still(message):
    """Until nothing is added for a while, which must come."""
    end = time.monotonic() + 60
    known = -1
    while len(message) != known:
        assert time.monotonic() < end
        known = len(message)
        time.sleep(0.5)


def test_files_are_synced_and_hashed_piece_by_piece(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * durable.HASH_BYTES + 1))
    pieces: list[None] = []
    entry = commit.sync_and_describe(file, progress=lambda: pieces.append(None))
    assert entry == {"size": 3 * durable.HASH_BYTES + 1, "sha256": sha256(file.read_bytes()).hexdigest()}
    assert len(pieces) == 1 + 4


def test_the_copies_of_a_checkpoint_lie_in_one_buffer_per_precision():
    like = {"a": torch.empty(3, 2), "b": torch.empty(5, dtype=torch.bfloat16), "c": torch.empty(4, device="meta")}
    buffers = flat_buffers(like, is_pinned=False)
    assert {name: (each.shape, each.dtype) for name, each in buffers.items()} == {
        name: (each.shape, each.dtype) for name, each in like.items()
    }
    for number, each in enumerate(buffers.values()):
        each.fill_(number)
    assert [each.unique().tolist() for each in buffers.values()] == [[0], [1], [2]], "they do not overlap"
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in buffers.values()}
    assert sorted(storages.values()) == [5 * 2, (6 + 4) * 4]


def test_the_memory_for_copies_is_made_before_the_first_save(tmp_path, engine):
    vars(engine).pop("_snapshots", None)
    Saver(tmp_path, engine=engine, tokenizer=tmp_path)
    assert "_snapshots" in vars(engine)


@pytest.mark.parametrize("error", [0, 2])
def test_host_memory_is_pinned_as_large_as_it_is_and_let_go(monkeypatch, error):
    calls = []
    cuda = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("pinned", address, size)) or error,
        cudaHostUnregister=lambda address: calls.append(("let go", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    with nullcontext() if error == 0 else pytest.raises(UserError, match=r"0\.0 GB of host memory .* cannot be pinned"):
        buffers = flat_buffers({"a": torch.empty(3), "b": torch.empty(2)}, is_pinned=True)
        address = buffers["a"].data_ptr()
        assert calls == [("pinned", address, 20)]
        del buffers
        gc.collect()
        assert calls[1:] == [("let go", address)]
