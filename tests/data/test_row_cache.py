"""Cached rows are the same rows, kept once; a damaged or half-written file is never taken for one."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from lamda.best_effort import BestEffort
from lamda.config.errors import DataError, RunError, UserError
from lamda.data import prepare
from lamda.data.blocks import LaneReader, Packing, Part, PartRows
from lamda.data.card import Source
from lamda.data.files import File
from lamda.data.lanes import Cursor
from lamda.data.partitioning import cut_into_lanes
from lamda.data.row_cache import RowCache
from lamda.data.rows import RowReader
from tests.conftest import full_disk, make_text, write_shard

PACKING = Packing(16)
WINDOWS = 12


@pytest.fixture
def lane(tmp_path):
    path = write_shard(tmp_path / "text.jsonl", [make_text(n, 31 * n % 90) for n in range(25)])
    path.write_bytes(b"no record\n" + path.read_bytes())
    source = Source(name="s", license="none", files="x.jsonl", domain="meta.pile_set_name")
    file = File(str(path), path.stat().st_size)
    (lane,) = cut_into_lanes(source, [file], sequence_length=16, max_lanes=1, max_bad_line_fraction=1)
    return lane


@pytest.fixture
def folder(tmp_path):
    return RowCache.of(str(tmp_path / "blocks"), {"files": "these", "weights": 1})


def expected_of(lane, tokenizer):
    """The lane's rows of each window, and the part that each is."""
    reader, start, made = LaneReader(lane, tokenizer, PACKING), Cursor(), []
    for number in range(WINDOWS):
        part = Part(0, start, None if number == WINDOWS - 1 else lane.axis_length * (number + 1) // WINDOWS)
        made.append((part, reader.read(part)))
        start = made[-1][1].after
    return made


def take(lane, tokenizer, folder, parts):
    """What a reader with the folder gives, and its progress, of windows and their parts."""
    reader = RowReader((lane,), tokenizer, PACKING, threads=1, domains={}, row_cache=folder)
    try:
        return [reader.get(0, window, part) for window, part in parts]
    finally:
        reader.close()


def assert_same(made, expected):
    assert len(made) == len(expected)
    for rows, (_, wanted) in zip(made, expected, strict=True):
        block, of = rows.block, wanted.block
        assert rows.progress == (len(of.ids), wanted.tokens, wanted.after)
        assert np.array_equal(block.ids, of.ids)
        assert np.array_equal(block.spans, of.spans)
        assert [each[1:5] for each in block.documents] == [each[1:5] for each in of.documents]
        assert block.quarantined == of.quarantined
        assert (block.loss_mask is None) == (of.loss_mask is None)
        assert of.loss_mask is None or np.array_equal(block.loss_mask, of.loss_mask)


def test_cached_rows_are_those_that_the_lane_makes(lane, folder, tokenizer):
    expected = expected_of(lane, tokenizer)
    assert any(rows.block.quarantined for _, rows in expected)
    assert any(rows.block.loss_mask is not None for _, rows in expected)
    parts = list(enumerate(part for part, _ in expected))
    for count in (5, WINDOWS, WINDOWS, 3):
        assert_same(take(lane, tokenizer, folder, parts[:count]), expected[:count])
    assert len(list((folder.path / "lane-0000").iterdir())) == WINDOWS
    known = [(n, part._replace(stop=expected[n][1].after)) for n, part in parts]
    assert_same(take(lane, tokenizer, folder, known), expected)


def test_cached_rows_are_given_without_their_source(lane, folder, tokenizer):
    expected = expected_of(lane, tokenizer)
    parts = list(enumerate(part for part, _ in expected))
    take(lane, tokenizer, folder, parts)
    Path(lane.slices[0].file.url).unlink()
    assert_same(take(lane, tokenizer, folder, parts[5:]), expected[5:])


def test_rows_of_another_part_of_the_text_are_made(lane, folder, tokenizer):
    expected = expected_of(lane, tokenizer)
    part, rows = expected[4]
    take(lane, tokenizer, folder, [(4, part)])
    for other in (
        part._replace(start=expected[5][0].start),
        part._replace(target=part.target + 9),
        part._replace(epoch=1),
    ):
        assert folder.find(0, 4, other) is None
    assert folder.find(0, 4, part).after == rows.after
    assert folder.find(0, 5, part) is None


def test_what_a_crash_leaves_behind_is_never_read(lane, folder, tokenizer):
    expected = expected_of(lane, tokenizer)
    take(lane, tokenizer, folder, [(0, expected[0][0])])
    (path,) = (folder.path / "lane-0000").iterdir()
    path.rename(path.with_name(".00000000-1-a.tmp"))
    assert folder.find(0, 0, expected[0][0]) is None
    assert_same(take(lane, tokenizer, folder, [(0, expected[0][0])]), expected[:1])


@pytest.mark.parametrize("where", [0, 100, -60, -45, -3])
def test_a_flipped_byte_is_an_error_that_names_the_file(lane, folder, tokenizer, where):
    parts = [(0, expected_of(lane, tokenizer)[0][0])]
    take(lane, tokenizer, folder, parts)
    (path,) = (folder.path / "lane-0000").glob("*.rows")
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00000000\.rows: damaged; delete it"):
        take(lane, tokenizer, folder, parts)


@pytest.mark.parametrize("length", [0, 30, 200])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(lane, folder, tokenizer, length):
    parts = [(0, expected_of(lane, tokenizer)[0][0])]
    take(lane, tokenizer, folder, parts)
    (path,) = (folder.path / "lane-0000").glob("*.rows")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"00000000\.rows: damaged; delete it"):
        take(lane, tokenizer, folder, parts)


def test_blocks_of_other_text_go_elsewhere_and_weights_do_not_matter(tmp_path):
    first = RowCache.of(str(tmp_path), {"files": "these", "weights": 1})
    assert RowCache.of(str(tmp_path), {"files": "these", "weights": 2}) == first
    assert RowCache.of(str(tmp_path), {"files": "others", "weights": 1}) != first


@pytest.mark.parametrize(("first", "end"), [(1, WINDOWS), (5, 6), (0, 1)])
def test_rows_that_the_disk_does_not_take_are_made_and_not_kept(tmp_path, lane, tokenizer, caplog, first, end):
    folder = RowCache.of(str(tmp_path / "blocks"), {}, guard=BestEffort("blocks cannot be kept"))
    expected = expected_of(lane, tokenizer)
    made = []
    for number, (part, _) in enumerate(expected):
        with full_disk() if first <= number < end else nullcontext():
            made += take(lane, tokenizer, folder, [(number, part)])
    assert_same(made, expected)
    assert [record.getMessage() for record in caplog.records if record.name == "lamda.best_effort"] == [
        "blocks cannot be kept (File too large); training continues"
    ]
    kept = [number for number in range(WINDOWS) if not first <= number < end]
    assert sorted(int(file.stem) for file in folder.path.glob("lane-0000/*.rows")) == kept
    assert not [*folder.path.rglob("*.tmp")]


def test_a_folder_that_cannot_be_made_costs_a_run_its_blocks_and_a_preparation_itself(
    tmp_path, lane, tokenizer, caplog
):
    place = tmp_path / "file"
    place.write_bytes(b"")
    folder = RowCache.of(str(place), {}, guard=BestEffort("blocks cannot be kept"))
    expected = expected_of(lane, tokenizer)[:3]
    assert_same(take(lane, tokenizer, folder, list(enumerate(part for part, _ in expected))), expected)
    assert "blocks cannot be kept (Not a directory)" in caplog.text
    with pytest.raises(UserError, match=r"data\.cache_dir .*Not a directory"):
        RowCache.of(str(place), {})


def test_a_preparation_on_a_full_disk_is_reported_where_and_why(lane, folder, tokenizer):
    parts = [(0, expected_of(lane, tokenizer)[0][0])]
    with full_disk(), pytest.raises(UserError, match=r"data\.cache_dir .*cannot be read or written \(File too large\)"):
        take(lane, tokenizer, folder, parts)


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
    take(lane, tokenizer, folder, [(0, expected_of(lane, tokenizer)[0][0])])
    writers[1].communicate(b"\n")
    assert sorted(file.name for file in place.iterdir()) == [names[1], "00000000.rows"]


def test_ids_of_a_large_vocabulary_are_kept_whole(lane, folder, tokenizer):
    part, rows = expected_of(lane, tokenizer)[0]
    wide = PartRows(rows.block.__class__(rows.block.ids + 70_000, rows.block.spans, rows.block.documents), *rows[1:])
    folder.store(0, 0, part, wide, narrow=False)
    assert np.array_equal(folder.find(0, 0, part).block.ids, wide.block.ids)


@pytest.mark.parametrize("where", ["lane-0001/00000000.rows", "lane-0000/00000001.rows"])
def test_a_file_under_the_name_of_other_rows_is_not_read_as_them(lane, folder, tokenizer, where):
    part, _ = expected_of(lane, tokenizer)[0]
    take(lane, tokenizer, folder, [(0, part)])
    moved = folder.path / where
    moved.parent.mkdir(exist_ok=True)
    moved.write_bytes((folder.path / "lane-0000" / "00000000.rows").read_bytes())
    with pytest.raises(DataError, match=f"{moved.name}: has the rows of .*lane-0000/00000000"):
        folder.find(int(where[8]), int(where[-6]), part)


def test_a_preparation_whose_process_is_killed_says_so():
    done = Future()
    done.set_exception(BrokenProcessPool("terminated abruptly"))
    with pytest.raises(RunError, match=r"was killed .* the same command continues"):
        prepare._result(done)


def test_a_preparation_counts_each_document_and_token_once(lane, tokenizer):
    lengths = [len(tokenizer.encode(make_text(n, 31 * n % 90))) + 1 for n in range(25)]
    summary, ends = prepare.BlockStats(), np.cumsum(lengths)
    block = LaneReader(lane, tokenizer, PACKING).read(Part(0, Cursor(), None)).block
    summary.add(block, tokenizer.token_bytes)
    assert sum(summary.tokens.values()) == sum(lengths)
    assert sum(summary.documents.values()) == 25
    begins = ends - lengths
    inside = [edge for edge in range(16, int(ends[-1]), 16) if not (edge == begins).any()]
    assert summary.cuts == len(inside)
    assert any((edge - begins == 1).any() for edge in inside)  # a row whose context is a document's first token
    assert sum(summary.utf8_bytes.values()) == sum(len(make_text(n, 31 * n % 90).encode()) for n in range(25))


def test_a_domain_may_be_called_all():
    summary = prepare.BlockStats(*(Counter({"all": number, "books": 3 * number}) for number in (1, 100, 400)))
    _, every, books, of_that_name, *_ = (line.split() for line in summary.table())
    assert every == ["all", "4", "400", "4.000", "100.00%"]
    assert books == ["books", "3", "300", "4.000", "75.00%"]
    assert of_that_name == ["all", "1", "100", "4.000", "25.00%"]
