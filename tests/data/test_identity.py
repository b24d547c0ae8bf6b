"""Text that changes between two runs, between a stop and a resume, or under a reader is refused by name."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamda.config.errors import DataError, UserError
from lamda.config.schema import Config
from lamda.data import identity
from lamda.data.blocks import LaneReader, Packing, Part
from lamda.data.card import Source
from lamda.data.corpus import changed_files, differences, fingerprint, open_corpus
from lamda.data.files import File, read_lines
from lamda.data.lanes import Cursor
from lamda.data.partitioning import cut_into_lanes
from lamda.data.resolving import require_here, resolve
from lamda.data.row_cache import RowCache
from lamda.data.windows import SourceOrder, Window
from lamda.storage.state import RunState
from lamda.training.resume import ResumePoint
from tests.conftest import make_text, write_shard

PACKING = Packing(14)
SHARED = [HealthCheck.function_scoped_fixture]


def config_of(folder: Path) -> Config:
    return Config.model_validate(
        {"data": {"corpus": "standard_library", "files": f"{folder}/*"}, "train": {"steps": 1}}
    )


def print_of(folder: Path, tokenizer):
    config = config_of(folder)
    return fingerprint(open_corpus(config.data), config, tokenizer)


def shards(folder: Path, *, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(3):
        write_shard(folder / f"{number}.jsonl", [make_text(n + number + seed, 20) for n in range(20)])
    return folder


def lane_of(path: Path, **fields):
    file = File(str(path), path.stat().st_size, **fields)
    source = Source(name="s", license="none", files="x")
    return cut_into_lanes(source, [file], sequence_length=14, max_lanes=1, max_bad_line_fraction=1)[0]


def order_of(*cursors: Cursor) -> SourceOrder:
    """A window that begins at these cursors, and another one that ends there."""
    windows = [Window(0, 0, 0, 0, 0, 5, (Cursor(),), (1,), cursors), Window(1, 0, 1, 0, 5, 9, cursors, (1,), cursors)]
    return SourceOrder(tuple(windows))


@settings(max_examples=40, deadline=None, suppress_health_check=SHARED)
@given(data=st.data(), number=st.integers(0, 2))
def test_any_edit_of_the_same_size_is_refused_by_name(tmp_path, tokenizer, data, number):
    folder = shards(tmp_path / "text")
    before = print_of(folder, tokenizer)
    (edited,) = [file for file in open_corpus(config_of(folder).data).files if file.name == f"{number}.jsonl"]
    content = bytearray(Path(edited.url).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    Path(edited.url).write_bytes(content)
    now = print_of(folder, tokenizer)
    assert changed_files(before, now) == [f"{number}.jsonl"]
    assert differences(before, now) == ["contents"]
    with pytest.raises(UserError, match=rf"step-1: the text has changed .*: {number}\.jsonl\. Put the former"):
        ResumePoint(Path("step-1"), RunState(fingerprint=before)).check_data(now)
    with pytest.raises(DataError, match=rf"{number}\.jsonl: was changed since this run began"):
        next(read_lines(edited))


def test_a_corpus_that_moved_is_the_same(tmp_path, tokenizer):
    before = print_of(shards(tmp_path / "text"), tokenizer)
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "0.jsonl").touch()
    assert print_of(tmp_path / "elsewhere", tokenizer) == before


def test_an_older_checkpoint_resumes_and_says_what_is_not_verified(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="lamda")
    now = json.loads(json.dumps(print_of(shards(tmp_path / "text"), tokenizer)))
    old = {name: value for name, value in now.items() if name != "contents"}
    state = ResumePoint(Path("step-1"), RunState(step=4, fingerprint=old)).check_data(now)
    assert (state.step, state.fingerprint) == (4, now)
    assert "whether they have changed is not verified" in caplog.text


def test_a_checkpoint_of_the_former_order_is_refused_in_words(tmp_path, tokenizer):
    now = print_of(shards(tmp_path / "text"), tokenizer)
    values = asdict(RunState(step=4, fingerprint={**now, "format": 1}))
    del values["order"]
    (tmp_path / "run_state.json").write_text(json.dumps({**values, "cursors": {"0": {"block": 1, "line": 3}}}))
    state = RunState.read(tmp_path / "run_state.json")
    assert state.order == ()
    with pytest.raises(
        UserError, match=r"step-4: its samples are in the order of another version \(format 1;.*weights"
    ):
        ResumePoint(Path("step-4"), state).check_data(now)


def test_a_changed_file_is_accepted_by_name_alone(tmp_path, tokenizer):
    before = print_of(shards(tmp_path / "text"), tokenizer)
    now = print_of(shards(tmp_path / "text", seed=0), tokenizer)
    now["contents"] = [[name, f"ETag {name}"] for name, _ in now["contents"]]
    start = ResumePoint(Path("step-1"), RunState(fingerprint=before, order=(order_of(Cursor(1, digest="x")),)))
    with pytest.raises(UserError, match=r"in 1 files .*: 2\.jsonl\. .*data\.accept_changed"):
        start.check_data(now, accepted=("0.jsonl", "1.jsonl"))
    state = start.check_data(now, accepted=("0.jsonl", "1.jsonl", "2.jsonl"))
    assert (state.fingerprint, state.order) == (now, (order_of(Cursor(1)),))


def test_files_of_one_name_are_reported_apart_by_all_their_contents():
    before = {"contents": [["0.jsonl", "a"], ["0.jsonl", "b"], ["1.jsonl", None]]}
    assert changed_files(before, {"contents": [["0.jsonl", "b"], ["0.jsonl", "a"], ["1.jsonl", "c"]]}) == []
    assert changed_files(before, {"contents": [["0.jsonl", "b"], ["0.jsonl", "c"], ["1.jsonl", "c"]]}) == ["0.jsonl"]


@settings(max_examples=60, deadline=None, suppress_health_check=SHARED)
@given(end=st.floats(0.05, 0.95), order=st.permutations(range(12)), suffix=st.sampled_from([".jsonl", ".jsonl.zst"]))
def test_a_cursor_lands_in_its_document_or_the_file_is_refused(tmp_path, tokenizer, end, order, suffix):
    lengths = [5, 30, 12, 5, 44, 9, 30, 7, 12, 21, 16, 3]
    texts = [make_text(n, length) for n, length in enumerate(lengths)]
    path = write_shard(tmp_path / f"0{suffix}", texts)
    lane = lane_of(path)
    first = LaneReader(lane, tokenizer, PACKING).read(Part(0, Cursor(), int(end * lane.axis_length)))
    cursor, rest = first.after, Part(0, first.after, None)
    unbroken = LaneReader(lane, tokenizer, PACKING).read(rest)
    write_shard(path, [texts[place] for place in order])
    try:
        again = LaneReader(lane_of(path), tokenizer, PACKING).read(rest)
    except DataError as error:
        message = str(error)
        assert f"0{suffix}, line {cursor.line + 1}: the document there is not the one" in message
        assert order[cursor.line] != cursor.line or order[: cursor.line] != list(range(cursor.line))
    else:
        assert cursor.token == 0 or order[cursor.line] == cursor.line
        assert order != list(range(12)) or np.array_equal(again.block.ids, unbroken.block.ids)


def test_a_cursor_without_a_digest_still_wants_a_document_at_its_line(tmp_path, tokenizer):
    path = write_shard(tmp_path / "0.jsonl", [make_text(n, 20) for n in range(9)])
    lane = lane_of(path)
    cursor = LaneReader(lane, tokenizer, PACKING).read(Part(0, Cursor(), lane.axis_length // 2)).after
    assert cursor.line > 0
    assert cursor.digest is not None
    plain = cursor._replace(digest=None)
    assert LaneReader(lane, tokenizer, PACKING).read(Part(0, plain, None)).tokens
    with pytest.raises(DataError, match=rf"0\.jsonl, line {cursor.line + 1}: the document there is not"):
        LaneReader(lane, tokenizer, PACKING).read(Part(0, plain._replace(byte=cursor.byte - 3), None))


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "0.jsonl"
    path.write_bytes(b"x\n" * (1 << 18))
    (file,) = resolve(Source(name="s", license="none", files=str(path)))
    lines = read_lines(file)
    next(lines)
    with path.open("r+b") as stream:
        stream.seek(1 << 18)
        stream.write(b"y")
    with pytest.raises(DataError, match=r"0\.jsonl: was written to while it was read"):
        list(lines)


def test_a_large_file_is_known_by_pieces_from_the_first_byte_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PIECE", 8)
    path, size = tmp_path / "0.jsonl", 5_000
    found = set()
    starts = [(size - 8) * place // 15 for place in range(16)]
    for place in [None, 0, size - 1, *(start + 7 for start in starts)]:
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        with path.open("rb") as stream:
            found.add(identity.content_of(stream, size))
    assert len(found) == 1 + 2 + 15  # the last piece's last byte is the last one


def test_ready_blocks_of_other_text_with_the_same_names_and_sizes_are_not_taken(tmp_path, tokenizer):
    english, german = tmp_path / "en", tmp_path / "de"
    for folder, text in ((english, "the cat sat on the mat"), (german, "die Katze sass da nun.")):
        folder.mkdir()
        write_shard(folder / "c.jsonl", [f"{text} {n:03}" for n in range(50)])
    assert (english / "c.jsonl").stat().st_size == (german / "c.jsonl").stat().st_size
    folders = {RowCache.of(str(tmp_path / "ready"), print_of(folder, tokenizer)).path for folder in (english, german)}
    assert len(folders) == 2


def test_every_machine_must_have_the_files(tmp_path):
    files = resolve(Source(name="s", license="none", files=f"{shards(tmp_path / 'text')}/*"))
    require_here(files)
    Path(files[1].url).write_bytes(b"short")
    with pytest.raises(DataError, match=r"1\.jsonl: has 5 bytes here"):
        require_here(files)
    Path(files[1].url).unlink()
    with pytest.raises(DataError, match=r"1\.jsonl: cannot be read \(No such file"):
        require_here(files)
