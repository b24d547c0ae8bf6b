"""Ready blocks are the same blocks, kept once; a damaged or half-written file is never taken for one."""

import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lamda.best_effort import BestEffort
from lamda.config.errors import RunError, UserError
from lamda.data import block_files, prepare
from lamda.data.block_files import BlockFolder
from lamda.data.blocks import Packing, read_blocks
from lamda.data.card import Source
from lamda.data.errors import DataError
from lamda.data.files import File
from lamda.data.lanes import Cursor, cut_into_lanes
from tests.conftest import full_disk, make_text, write_shard

PACKING = Packing(rows=3, row_length=17, seed=2)


@pytest.fixture
def lane(tmp_path):
    path = write_shard(tmp_path / "text.jsonl", [make_text(n, 31 * n % 90) for n in range(25)])
    path.write_bytes(b"no record\n" + path.read_bytes())
    source = Source(name="s", licence="none", files="x.jsonl", domain="meta.pile_set_name")
    (lane,) = cut_into_lanes(source, [File(str(path), path.stat().st_size)], lanes=1, max_bad_fraction=1)
    return lane


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(block_files, "GROUP", 8)
    return BlockFolder.of(str(tmp_path / "blocks"), {"files": "these", "weights": 1})


def take(source, count):
    found = list(islice(source, count))
    source.close()
    return found


def assert_same(made, expected):
    assert len(made) == len(expected)
    for (block, after), (wanted, wanted_after) in zip(made, expected, strict=True):
        assert after == wanted_after
        assert block.number == wanted.number
        assert np.array_equal(block.ids, wanted.ids)
        assert block.ids.dtype == np.uint32
        assert np.array_equal(block.runs, wanted.runs)
        assert (block.documents, block.quarantined) == (wanted.documents, wanted.quarantined)


def test_ready_blocks_are_those_that_the_lane_makes(lane, folder, tokenizer):
    expected = take(read_blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 21)
    assert any(block.quarantined for block, _ in expected)
    for count in (5, 21, 21, 3):
        made = take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), count)
        assert_same(made, expected[:count])
    assert folder.ready_until(0, 0) == 21
    assert folder.cursor_at(0, 13) == expected[12][1]


def test_a_resume_from_ready_blocks_does_not_read_the_source(lane, folder, tokenizer):
    expected = take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 16)
    Path(lane.shares[0].file.url).unlink()
    again = take(folder.blocks(lane, expected[4][1], packing=PACKING, tokenizer=tokenizer), 11)
    assert_same(again, expected[5:])


def test_blocks_from_the_middle_are_kept_and_found_again(lane, folder, tokenizer):
    expected = take(read_blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 12)
    take(folder.blocks(lane, expected[2][1], packing=PACKING, tokenizer=tokenizer), 4)
    assert sorted(path.name for path in (folder.path / "lane-0000").iterdir()) == ["00000003-00000007.blocks"]
    assert_same(take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 12), expected)


def test_what_a_crash_leaves_behind_is_never_read(lane, folder, tokenizer):
    blocks = folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer)
    expected = list(islice(blocks, 3))
    leftover = next((folder.path / "lane-0000").glob(".*.tmp"))
    leftover.with_name(".copy.tmp").write_bytes(leftover.read_bytes())
    assert folder.ready_until(0, 0) == 0
    blocks.close()
    assert_same(take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3), expected)


@pytest.mark.parametrize("where", [0, 100, -60, -45, -3])
def test_a_flipped_byte_is_an_error_that_names_the_file(lane, folder, tokenizer, where):
    take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 8)
    (path,) = (folder.path / "lane-0000").glob("*.blocks")
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00000000-00000008\.blocks"):
        take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 8)


@pytest.mark.parametrize("where", ["lane-0001/00000000-00000008.blocks", "lane-0000/00000008-00000016.blocks"])
def test_a_file_under_the_name_of_other_blocks_is_not_read_as_them(lane, folder, tokenizer, where):
    take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 8)
    name, moved = folder.path / "lane-0000" / "00000000-00000008.blocks", folder.path / where
    moved.parent.mkdir(exist_ok=True)
    moved.write_bytes(name.read_bytes())
    wrong = replace(lane, index=1) if "lane-0001" in where else lane
    with pytest.raises(DataError, match=f"{moved.name}: holds other blocks than its name says .*lane-0000"):
        take(folder.blocks(wrong, Cursor(block=int(moved.name[:8])), packing=PACKING, tokenizer=tokenizer), 1)


def test_an_empty_file_is_damaged_and_one_of_another_name_is_none_of_the_folder(lane, folder, tokenizer):
    expected = take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3)
    (folder.path / "lane-0000" / "notes.blocks").write_text("the user's")
    assert_same(take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3), expected)
    (folder.path / "lane-0000" / "00000000-00000003.blocks").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000003\.blocks: damaged; delete it"):
        take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3)


def test_files_of_versions_that_did_not_say_whose_they_are_are_read(lane, folder, tokenizer, monkeypatch):
    monkeypatch.setattr(block_files, "_place", lambda folder: None)
    expected = take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3)
    path = folder.path / "lane-0000" / "00000000-00000003.blocks"
    assert b'"place": null' in path.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(block_files, "GROUP", 8)
    assert_same(take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3), expected)


def test_blocks_of_other_text_go_elsewhere_and_weights_do_not_matter(tmp_path):
    first = BlockFolder.of(str(tmp_path), {"files": "these", "weights": 1})
    assert BlockFolder.of(str(tmp_path), {"files": "these", "weights": 2}) == first
    assert BlockFolder.of(str(tmp_path), {"files": "others", "weights": 1}) != first


@pytest.mark.parametrize(("first", "end", "kept"), [(1, 30, []), (8, 9, [8, 16, 24]), (16, 17, [0, 16, 24])])
def test_blocks_that_the_disk_does_not_take_are_made_and_not_kept(
    tmp_path, lane, tokenizer, monkeypatch, caplog, first, end, kept
):
    monkeypatch.setattr(block_files, "GROUP", 8)
    folder = BlockFolder.of(str(tmp_path / "blocks"), {}, keeping=BestEffort("blocks cannot be kept"))
    expected = take(read_blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 30)
    made = []
    with full_disk() if end == 30 else nullcontext():
        blocks = folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer)
        for number in range(30):
            with full_disk() if first <= number < end else nullcontext():
                made.append(next(blocks))
        blocks.close()
    assert_same(made, expected)
    assert [record.getMessage() for record in caplog.records if record.name == "lamda.best_effort"] == [
        "blocks cannot be kept (File too large); training continues"
    ]
    assert sorted(int(file.name[:8]) for file in folder.path.glob("lane-0000/*.blocks")) == kept
    assert not [*folder.path.rglob("*.tmp")]


def test_a_folder_that_cannot_be_made_costs_a_run_its_blocks_and_a_preparation_itself(
    tmp_path, lane, tokenizer, caplog
):
    place = tmp_path / "file"
    place.write_bytes(b"")
    folder = BlockFolder.of(str(place), {}, keeping=BestEffort("blocks cannot be kept"))
    assert len(take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 3)) == 3
    assert "blocks cannot be kept (Not a directory)" in caplog.text
    with pytest.raises(UserError, match=r"data\.blocks .*Not a directory"):
        BlockFolder.of(str(place), {})


def test_a_preparation_on_a_full_disk_is_told_where_and_why(lane, folder, tokenizer):
    with full_disk(), pytest.raises(UserError, match=r"data\.blocks .*cannot be read or written \(File too large\)"):
        take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 9)


WRITER = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX); print(); input()"


def test_a_writer_deletes_what_killed_ones_left_and_nothing_of_living_ones(lane, folder, tokenizer):
    place = folder.path / "lane-0000"
    place.mkdir()
    names = [".00000000-1-a.tmp", ".00000000-2-b.tmp"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", WRITER, place / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for writer in writers:
        writer.stdout.readline()
    writers[0].kill()
    writers[0].communicate()
    take(folder.blocks(lane, Cursor(), packing=PACKING, tokenizer=tokenizer), 2)
    writers[1].communicate(b"\n")
    assert sorted(file.name for file in place.iterdir()) == [names[1], "00000000-00000002.blocks"]


def test_a_preparation_whose_process_is_killed_says_so():
    done = Future()
    done.set_exception(BrokenProcessPool("terminated abruptly"))
    with pytest.raises(RunError, match=r"was killed .* the same command continues"):
        prepare._result(done)
