"""Every token of every document, once an epoch, in blocks that their cursor alone can make."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.data.blocks import Packing, read_blocks
from lamda.data.card import Source
from lamda.data.files import File
from lamda.data.lanes import Cursor, cut_into_lanes, read_lane
from tests.conftest import make_text, write_shard

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(6, 150)), min_size=3, max_size=9)


def source(files=("x.jsonl",)):
    return Source(name="s", licence="none", files=files, domain="meta.pile_set_name")


def lanes_of(folder, files, *, lanes):
    paths = [write_shard(folder / f"{n}.jsonl.zst", texts) for n, texts in enumerate(files)]
    return cut_into_lanes(source(), [File(str(path), path.stat().st_size) for path in paths], lanes=lanes)


def unpermuted(block, rows):
    """The tokens of a block in the lane's own order, by the runs' bookkeeping."""
    stretches = []
    for run in block.runs:
        document = block.documents[run["document"]]
        ids = block.ids[run["row"], run["start"] : run["start"] + run["length"]]
        stretches.append(((document.epoch, document.file, document.line, int(run["token"])), ids))
    assert sum(len(ids) for _, ids in stretches) == block.ids.size
    return np.concatenate([ids for _, ids in sorted(stretches, key=lambda stretch: stretch[0])])


@settings(max_examples=10, deadline=None)
@given(
    files=st.lists(LENGTHS, min_size=1, max_size=3),
    lanes=st.sampled_from([1, 2, 3]),
    rows=st.sampled_from([1, 3, 5]),
    length=st.sampled_from([7, 31]),
    method=st.sampled_from(["concat", "best_fit"]),
)
def test_a_lane_gives_every_token_of_its_documents_once_an_epoch(
    tmp_path_factory, tokenizer, files, lanes, rows, length, method
):
    texts = [[make_text(31 * f + n, words) for n, words in enumerate(file)] for f, file in enumerate(files)]
    packing = Packing(rows=rows, row_length=length, seed=3, method=method)
    for lane in lanes_of(tmp_path_factory.mktemp("lane"), texts, lanes=lanes):
        expected = np.array(
            [
                token
                for share in lane.shares
                for line, text in enumerate(texts[int(Path(share.file.url).name.split(".")[0])])
                if line % share.modulus == share.residue
                for token in [*tokenizer.encode(text), tokenizer.end_of_document]
            ],
            np.uint32,
        )
        count = 2 + 2 * len(expected) // (rows * length)
        made = list(islice(read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer), count))
        stream = np.concatenate([unpermuted(block, rows) for block, _ in made])
        assert np.array_equal(stream, np.resize(expected, len(stream)))
        for (_, cursor), (block, after) in pairwise(made):
            again, again_after = next(read_blocks(lane, cursor, packing=packing, tokenizer=tokenizer))
            assert np.array_equal(again.ids, block.ids)
            assert np.array_equal(again.runs, block.runs)
            assert again_after == after


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_runs_and_documents_tell_where_every_token_came_from(tmp_path, tokenizer, method):
    texts = [[make_text(n, n * n % 40) for n in range(12)]]
    (lane,) = lanes_of(tmp_path, texts, lanes=1)
    packing = Packing(rows=5, row_length=29, seed=1, method=method)
    block, _ = next(read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer))
    for run in block.runs:
        document = block.documents[run["document"]]
        whole = [*tokenizer.encode(texts[0][document.line]), tokenizer.end_of_document]
        shown = block.ids[run["row"], run["start"] : run["start"] + run["length"]]
        assert shown.tolist() == whole[run["token"] : run["token"] + run["length"]]


def test_best_fit_arranges_the_tokens_of_concats_blocks_with_fewer_cuts(tmp_path, tokenizer):
    (lane,) = lanes_of(tmp_path, [[make_text(n, 7 * n * n % 60) for n in range(60)]], lanes=1)
    made = []
    for method in ("concat", "best_fit"):
        packing = Packing(rows=16, row_length=61, seed=1, method=method)
        made.append(list(islice(read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer), 4)))
    for (concat, after), (best_fit, same_after) in zip(*made, strict=True):
        assert same_after == after
        assert best_fit.documents == concat.documents
        assert np.array_equal(unpermuted(best_fit, 16), unpermuted(concat, 16))
        assert len(best_fit.runs) < len(concat.runs)


def test_rows_are_permuted_differently_in_each_block(tmp_path, tokenizer):
    (lane,) = lanes_of(tmp_path, [[make_text(n, 200) for n in range(20)]], lanes=1)
    packing = Packing(rows=16, row_length=20, seed=0)
    orders: list[list[int]] = []
    for block, _ in islice(read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer), 3):
        first = [block.runs[block.runs["row"] == row][0] for row in range(16)]  # a row's first run
        orders.append(sorted(range(16), key=lambda row: (first[row]["document"], first[row]["token"])))
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != list(range(16)) for order in orders)


def test_lanes_share_files_by_lines_or_take_every_nth():
    files = [File(f"{n}.jsonl", 100) for n in range(3)]
    by_lines = cut_into_lanes(source(), files, lanes=8)
    assert [(lane.shares[0].file.url, lane.shares[0].residue, lane.shares[0].modulus) for lane in by_lines] == [
        ("0.jsonl", 0, 3), ("1.jsonl", 0, 3), ("2.jsonl", 0, 2), ("0.jsonl", 1, 3),
        ("1.jsonl", 1, 3), ("2.jsonl", 1, 2), ("0.jsonl", 2, 3), ("1.jsonl", 2, 3),
    ]  # fmt: skip
    by_files = cut_into_lanes(source(), files, lanes=2)
    assert [[share.file.url for share in lane.shares] for lane in by_files] == [["0.jsonl", "2.jsonl"], ["1.jsonl"]]
    assert len(cut_into_lanes(source(), files, lanes=None)) == 8
    assert len(cut_into_lanes(source(), files * 30, lanes=None)) == 64


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("of the\nand to\n", "utf-8")
    (lane,) = cut_into_lanes(source(), [File(str(path), path.stat().st_size)], lanes=None)
    block, _ = next(read_blocks(lane, Cursor(), packing=Packing(rows=1, row_length=40, seed=0), tokenizer=tokenizer))
    assert tokenizer.decode(block.ids[0]).startswith("of the\nand to\nof the\nand to\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (marked,) = cut_into_lanes(source(), [File(str(path), path.stat().st_size)], lanes=None)
    assert next(read_lane(marked, Cursor())).text.startswith("of the\n")
    with pytest.raises(UserError, match=r"data\.lanes 2"):
        cut_into_lanes(source(), [File(str(path), 1)], lanes=2)


def test_parquet_is_streamed_and_resumed(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [make_text(n, 30) for n in range(9)]
    table = pa.table({"text": texts, "meta": [{"pile_set_name": "p"}] * 9})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=4)
    file = File(str(tmp_path / "0.parquet"), (tmp_path / "0.parquet").stat().st_size)
    lanes = cut_into_lanes(source(), [file], lanes=2)
    packing = Packing(rows=1, row_length=50, seed=0)
    made = list(islice(read_blocks(lanes[1], Cursor(), packing=packing, tokenizer=tokenizer), 4))
    stream = np.concatenate([block.ids.ravel() for block, _ in made])
    assert tokenizer.decode(stream).startswith("".join(texts[1::2])[:100])
    again, _ = next(read_blocks(lanes[1], made[1][1], packing=packing, tokenizer=tokenizer))
    assert np.array_equal(again.ids, made[2][0].ids)


def test_an_empty_lane_is_an_error_that_says_what_to_do(tmp_path, tokenizer):
    lanes = lanes_of(tmp_path, [["a", "b"]], lanes=3)
    with pytest.raises(UserError, match=r"set data\.lanes lower"):
        next(read_blocks(lanes[2], Cursor(), packing=Packing(rows=1, row_length=9, seed=0), tokenizer=tokenizer))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_local_text_needs_no_cache_that_can_be_written(tmp_path, monkeypatch, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/no-folder"))
    path, texts = tmp_path / f"0.{suffix}", [make_text(n, 9) for n in range(5)]
    write_shard(path, texts) if suffix == "jsonl" else pq.write_table(pa.table({"text": texts}), path)
    (lane,) = cut_into_lanes(source(), [File(str(path), path.stat().st_size)], lanes=1)
    assert [row["text"] for row in islice(lane.documents(Cursor()), 5)] == texts
