"""Every token of every document, once an epoch, in rows that a cursor and an end alone make."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.data import partitioning
from lamda.data.blocks import LaneReader, Packing, Part
from lamda.data.card import Source
from lamda.data.files import File
from lamda.data.lanes import Cursor
from lamda.data.partitioning import cut_into_lanes
from tests.conftest import make_text, write_shard

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(6, 150)), min_size=3, max_size=9)
SOURCE = Source(name="s", license="none", files=("x.jsonl",), domain="meta.pile_set_name")


def lanes_of(paths, *, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "MIN_ROWS_PER_LANE", 1)
        return cut_into_lanes(
            SOURCE, [File(str(path), path.stat().st_size) for path in paths], sequence_length=1, max_lanes=most
        )


def parts_of(lane, tokenizer, packing, ends, *, epoch=0):
    """What a lane gives to windows that end at these fractions of it, and at its end: each with its part."""
    reader, start, made = LaneReader(lane, tokenizer, packing), Cursor(), []
    for target in [*(int(end * lane.axis_length) for end in sorted(ends)), None]:
        part = Part(epoch, start, target)
        made.append((part, reader.read(part)))
        start = made[-1][1].after
    return made


def assert_same(one, other):
    assert np.array_equal(one.block.ids, other.block.ids)
    assert np.array_equal(one.block.spans, other.block.spans)
    assert [each[:5] for each in one.block.documents] == [each[:5] for each in other.block.documents]
    assert one.block.quarantined == other.block.quarantined
    assert (one.tokens, one.after) == (other.tokens, other.after)


def stream_of(blocks):
    """The targets of blocks in the lane's own order, by the bookkeeping of their spans."""
    found = {}
    for block in blocks:
        for span in block.spans[block.spans["document"] >= 0]:
            document = block.documents[span["document"]]
            for place in range(max(span["start"], 1), span["start"] + span["length"]):
                token = (document.file, document.line, int(span["token"] + place - span["start"]))
                assert token not in found
                found[token] = block.ids[span["row"], place]
    return [found[token] for token in sorted(found)]


@settings(max_examples=20, deadline=None)
@given(
    files=st.lists(LENGTHS, min_size=1, max_size=3),
    most=st.sampled_from([1, 3, 20]),
    length=st.sampled_from([7, 31]),
    method=st.sampled_from(["concat", "best_fit"]),
    ends=st.lists(st.floats(0, 1), max_size=4),
)
def test_a_lane_gives_every_token_of_its_documents_once_whatever_the_windows(
    tmp_path_factory, tokenizer, files, most, length, method, ends
):
    folder = tmp_path_factory.mktemp("lane")
    texts = [[make_text(31 * f + n, words) for n, words in enumerate(file)] for f, file in enumerate(files)]
    paths = [write_shard(folder / f"{n}.jsonl.zst", each) for n, each in enumerate(texts)]
    stream, packing = [], Packing(length, method)
    for lane in lanes_of(paths, most=most):
        made = parts_of(lane, tokenizer, packing, ends)
        stream += stream_of([rows.block for _, rows in made])
        for place, (part, rows) in enumerate(made):
            assert len(rows.block.ids) == -(-rows.tokens // length)
            assert rows.tokens % length == 0 or place == len(made) - 1
            assert_same(LaneReader(lane, tokenizer, packing).read(part), rows)
            if place < len(made) - 1:  # a known part is read to its end, whatever is planned
                assert_same(LaneReader(lane, tokenizer, packing).read(part._replace(stop=rows.after)), rows)
    expected = [[*tokenizer.encode(text), tokenizer.end_of_document] for file in texts for text in file]
    assert stream == [token for document in expected for token in document]


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_spans_and_documents_say_where_every_token_came_from(tmp_path, tokenizer, method):
    texts = [make_text(n, n * n % 40) for n in range(12)]
    (lane,) = lanes_of([write_shard(tmp_path / "0.jsonl", texts)], most=1)
    for _, (block, *_) in parts_of(lane, tokenizer, Packing(28, method), [0.4]):
        assert np.array_equal(block.spans, np.sort(block.spans, order=("row", "start")))
        assert block.spans["length"].sum() == block.ids.size
        for span in block.spans:
            shown = block.ids[span["row"], span["start"] : span["start"] + span["length"]].tolist()
            if span["document"] >= 0:
                line = block.documents[span["document"]].line
                whole = [*tokenizer.encode(texts[line]), tokenizer.end_of_document]
                assert shown == whole[span["token"] : span["token"] + span["length"]]
            elif span["start"] == 0:
                assert shown == [tokenizer.end_of_document]
            else:
                assert set(shown) == {tokenizer.padding}
                assert not block.loss_mask[span["row"], span["start"] :].any()


def test_a_rows_first_id_is_the_token_before_it_in_its_document_or_the_end_symbol(tmp_path, tokenizer):
    texts = [make_text(n, 70) for n in range(9)]
    (lane,) = lanes_of([write_shard(tmp_path / "0.jsonl", texts)], most=1)
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_document]]
    made = parts_of(lane, tokenizer, Packing(16), [0.3, 0.31, 0.7])
    rows = np.concatenate([rows.block.ids for _, rows in made])
    before = [tokenizer.end_of_document, *stream]
    assert rows[:, 0].tolist() == before[: len(stream) : 16]


def test_best_fit_arranges_the_tokens_of_concats_rows_with_fewer_cuts(tmp_path, tokenizer):
    path = write_shard(tmp_path / "0.jsonl", [make_text(n, 7 * n * n % 60) for n in range(60)])
    (lane,) = lanes_of([path], most=1)
    concat, best_fit = (parts_of(lane, tokenizer, Packing(60, method), [0.5]) for method in ("concat", "best_fit"))
    for (part, plain), (same, fitted) in zip(concat, best_fit, strict=True):
        assert (part, plain.tokens, plain.after) == (same, fitted.tokens, fitted.after)
        assert stream_of([plain.block]) == stream_of([fitted.block])
        assert (fitted.block.spans["token"] > 0).sum() < (plain.block.spans["token"] > 0).sum()


def test_a_book_is_read_window_by_window_and_never_encoded_at_once(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "book.txt").write_text("".join(make_text(n, 1000) + "\n" for n in range(100)), "utf-8")
    (lane,) = lanes_of([tmp_path / "book.txt"], most=64)
    expected = [*tokenizer.encode((tmp_path / "book.txt").read_text()), tokenizer.end_of_document]
    encoded, encode = [], tokenizer.encode_documents
    monkeypatch.setattr(
        tokenizer,
        "encode_documents",
        lambda texts, **more: encoded.append(sum(map(len, texts))) or encode(texts, **more),
    )
    reader = LaneReader(lane, tokenizer, Packing(64))
    first = reader.read(Part(0, Cursor(), lane.axis_length // 10))
    assert sum(encoded) < lane.axis_length / 4
    assert first.tokens / len(expected) == pytest.approx(0.1, abs=0.02)
    rest = reader.read(Part(0, first.after, None))
    ids = np.concatenate([first.block.ids[:, 1:], rest.block.ids[:, 1:]]).ravel()
    assert ids[: len(expected)].tolist() == expected
    assert LaneReader(lane, tokenizer, Packing(64)).read(Part(0, first.after, None)).tokens == rest.tokens


def test_a_text_file_is_one_document_and_has_no_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("of the\nand to\n", "utf-8")
    (lane,) = lanes_of([path], most=64)
    (_, rows), *_ = parts_of(lane, tokenizer, Packing(40), [])
    assert tokenizer.decode(rows.block.ids[0]) == "of the\nand to\n"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (marked,) = lanes_of([path], most=64)
    assert next(marked.read(Cursor())).text == "of the\nand to\n"


def test_parquet_is_cut_by_rows_and_resumed(tmp_path, tokenizer):
    texts = [make_text(n, 30) for n in range(40)]
    table = pa.table({"text": texts, "meta": [{"pile_set_name": "p"}] * 40})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=4)
    made = lanes_of([tmp_path / "0.parquet"], most=5)
    assert len(made) == 5
    stream = []
    for lane in made:
        parts = parts_of(lane, tokenizer, Packing(16), [0.2, 0.6])
        assert all(rows.tokens for _, rows in parts)
        for part, rows in parts:
            assert_same(LaneReader(lane, tokenizer, Packing(16)).read(part), rows)
        stream += stream_of([rows.block for _, rows in parts])
    assert tokenizer.decode(stream) == "".join(texts)


def test_rows_are_the_same_whatever_is_encoded_together(tmp_path, tokenizer, monkeypatch):
    (lane,) = lanes_of([write_shard(tmp_path / "0.jsonl", [make_text(n, 40) for n in range(30)])], most=1)
    straight = parts_of(lane, tokenizer, Packing(16), [0.2, 0.6])
    monkeypatch.setattr("lamda.data.spans.ENCODE_CHARACTERS", 300)
    for (_, one), (_, other) in zip(straight, parts_of(lane, tokenizer, Packing(16), [0.2, 0.6]), strict=True):
        assert_same(one, other)
    assert len({rows.after for _, rows in straight}) == len(straight)
    assert all(one.after.place < other.after.place for (_, one), (_, other) in pairwise(straight))
