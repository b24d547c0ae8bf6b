"""Ready blocks are the same blocks, kept once; a damaged or half-written file is never taken for one."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lamda.data import block_files
from lamda.data.block_files import BlockFolder
from lamda.data.blocks import Packing, read_blocks
from lamda.data.card import Source
from lamda.data.errors import DataError
from lamda.data.files import File
from lamda.data.lanes import Cursor, cut_into_lanes
from tests.conftest import make_text, write_shard

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


def test_blocks_of_other_text_go_elsewhere_and_weights_do_not_matter(tmp_path):
    first = BlockFolder.of(str(tmp_path), {"files": "these", "weights": 1})
    assert BlockFolder.of(str(tmp_path), {"files": "these", "weights": 2}) == first
    assert BlockFolder.of(str(tmp_path), {"files": "others", "weights": 1}) != first
