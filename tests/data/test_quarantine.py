"""A line without a document is counted once, kept for a look, and never ends a run silently."""

import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data import files, lanes, quarantine
from lamda.data.blocks import Packing, read_blocks
from lamda.data.card import Source
from lamda.data.corpus import open_corpus, packing_of
from lamda.data.files import DataError, File, read_lines
from lamda.data.lanes import Cursor, cut_into_lanes, read_lane
from lamda.data.loader import Loader, merge_cursors
from lamda.data.quarantine import BadLine, Quarantined, few, first_of, write_first
from tests.conftest import make_text

SOURCE = Source(name="s", licence="none", files=("x",), domain="meta.pile_set_name")
BAD = b"{not json}"


def good(text, domain="d"):
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode()


def lanes_of(folder: Path, contents, *, count, limit=1.0):
    """Lanes over .jsonl files of these lines."""
    made = []
    for number, lines in enumerate(contents):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        made.append(File(str(path), path.stat().st_size))
    return cut_into_lanes(SOURCE, made, lanes=count, max_bad_fraction=limit)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (BAD, "not JSON"),
        (b'{"text": "cut o', "not JSON"),
        (b'{"text": "a"} x', "not JSON"),
        (b'{"text": "\\ud800 alone"}', "not JSON"),
        (b'{"text": "\xff\xfe"}', "not JSON"),
        (b'{"text": NaN}', "not JSON"),
        (b'{"txt": "a", "n": 1}', "no text at 'text' (found nothing; its keys are 'txt', 'n')"),
        (b'{"text": 5}', "no text at 'text' (found int)"),
        (b'["text"]', "no text at 'text' (found nothing)"),
        (b'"text"', "no text at 'text' (found nothing)"),
    ],
)
def test_a_line_without_a_document_is_told_with_its_place_and_reason(tmp_path, line, reason):
    (lane,) = lanes_of(tmp_path, [[good("a"), b"", b"  ", line, good("b")]], count=1)
    first, second = islice(read_lane(lane, Cursor()), 2)
    assert (first.text, first.bad, second.text) == ("a", (), "b")
    (bad,) = second.bad
    assert (bad.epoch, bad.file, bad.line) == (0, str(tmp_path / "0.jsonl"), 3)
    assert bad.reason.startswith(reason)
    assert bad.beginning == line.decode("utf-8", "backslashreplace")


def test_text_under_another_key_is_answered_with_the_keys_that_there_are_and_the_remedy(tmp_path):
    (lane,) = lanes_of(tmp_path, [[b'{"content": "a", "meta": {}}'] * 3], count=1)
    with pytest.raises(DataError, match=r"its keys are 'content', 'meta'\).*a card whose `text:` names it"):
        next(read_lane(lane, Cursor()))


def test_a_parquet_file_without_the_column_is_answered_with_those_that_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    (lane,) = cut_into_lanes(SOURCE, [File(str(path), path.stat().st_size)], lanes=1)
    with pytest.raises(DataError, match=r"no column 'text' or 'meta' \(the file has 'content', 'id'\)"):
        next(read_lane(lane, Cursor()))


def test_strange_names_of_keys_are_cut_short():
    assert few(["k" * 100, *map(str, range(20))]) == f"'{'k' * 40}...', '0', '1', '2', '3', '4', '5', '6', ..."


def test_a_missing_domain_is_unknown_and_not_bad(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "b", "meta": null}', b'{"text": "c", "meta": {"pile_set_name": 3}}']
    (lane,) = lanes_of(tmp_path, [lines], count=1)
    documents = list(islice(read_lane(lane, Cursor()), 3))
    assert [(document.text, document.domain, document.bad) for document in documents] == [
        (text, "unknown", ()) for text in "abc"
    ]


def test_a_line_over_the_limit_is_bad_and_the_lines_around_it_are_whole(tmp_path, monkeypatch):
    for module in (files, lanes):
        monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    edge = good("e" * (1000 - len(good(""))))
    content = [good("a"), good("x" * 700_000), edge, edge.replace(b"e", b"ee", 1), good("b")]
    path = tmp_path / "0.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(content)))
    file = File(str(path), path.stat().st_size)
    lines = list(read_lines(file))
    assert [line.data for line in lines] == [line[:1001] for line in content]
    assert [line.byte for line in lines] == [sum(len(line) + 1 for line in content[:n]) for n in range(5)]
    (lane,) = cut_into_lanes(SOURCE, [file], lanes=1, max_bad_fraction=1.0)
    documents = list(islice(read_lane(lane, Cursor()), 3))
    assert [document.line for document in documents] == [0, 2, 4]
    assert [[bad.line for bad in document.bad] for document in documents] == [[], [1], [3]]
    assert documents[1].bad[0].beginning == content[1][:200].decode()


def test_a_row_of_parquet_without_text_is_bad(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    (lane,) = cut_into_lanes(SOURCE, [File(str(path), path.stat().st_size)], lanes=1, max_bad_fraction=1.0)
    first, second = islice(read_lane(lane, Cursor()), 2)
    assert (first.text, second.text, [bad.line for bad in second.bad]) == ("a", "b", [1])
    assert second.bad[0].beginning == "{'text': None}"


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"[Infinity, NaN]"])
def test_a_number_that_json_does_not_know_costs_no_document(tmp_path, number):
    line = b'{"text": "a \xc3\xbc NaN", "id": 123456789012345678901234567890, "score": ' + number
    (lane,) = lanes_of(tmp_path, [[line + b"}", line, line[:-1] + b'"\\ud800", "x": NaN}', good("b")]], count=1)
    first, second = islice(read_lane(lane, Cursor()), 2)
    assert (first.text, first.bad, second.text) == ("a \u00fc NaN", (), "b")
    assert [(bad.line, bad.reason[:8]) for bad in second.bad] == [(1, "not JSON"), (2, "not JSON")]


def parquet(path: Path, columns, **fields) -> File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **fields)
    return File(str(path), path.stat().st_size)


def test_only_the_needed_columns_of_parquet_are_read(tmp_path):
    import pyarrow as pa

    odd = {
        "pairs": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "id": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 3, pa.binary(16))),
        "day": pa.array([2**60] * 3, pa.timestamp("us")),
    }
    file = parquet(
        tmp_path / "part[1]::x.parquet", {"text": ["a", "b", "c"], "meta": [{"pile_set_name": "p"}] * 3} | odd
    )
    (lane,) = cut_into_lanes(SOURCE, [file], lanes=1)
    assert [(row.text, row.domain) for row in islice(read_lane(lane, Cursor()), 4)] == [(text, "p") for text in "abca"]


def test_text_of_parquet_that_cannot_be_decoded_is_one_bad_line(tmp_path):
    import pyarrow as pa

    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")]
    )
    (lane,) = cut_into_lanes(SOURCE, [parquet(tmp_path / "0.parquet", {"text": text})], lanes=1, max_bad_fraction=1)
    first, second = islice(read_lane(lane, Cursor()), 2)
    assert (first.text, second.text) == ("a", "b")
    assert [(bad.line, bad.reason[:17]) for bad in second.bad] == [(1, "cannot be decoded")]


def test_a_parquet_file_without_rows_or_whole_is_named_with_what_to_do(tmp_path):
    import pyarrow as pa

    empty = parquet(tmp_path / "0.parquet", {"text": pa.array([], pa.string())})
    lanes = cut_into_lanes(SOURCE, [empty], lanes=2)
    with pytest.raises(DataError, match=r"0\.parquet: holds no document .*take the file out"):
        next(read_lane(lanes[0], Cursor()))
    Path(empty.url).write_bytes(Path(empty.url).read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"0\.parquet: cannot be read as parquet"):
        next(read_lane(lanes[0], Cursor()))


@pytest.mark.parametrize(("suffix", "content"), [(".jsonl", b""), (".jsonl.gz", gzip.compress(b" \n\n", mtime=0))])
def test_no_number_of_lanes_helps_a_file_without_text(tmp_path, suffix, content):
    (tmp_path / f"0{suffix}").write_bytes(content)
    lanes = cut_into_lanes(SOURCE, [File(str(tmp_path / f"0{suffix}"), len(content))], lanes=2)
    with pytest.raises(DataError, match="take the file out"):
        next(read_lane(lanes[0], Cursor()))


LINES = st.lists(st.sampled_from(["good", "empty", "long", "bad", "blank"]), min_size=1, max_size=14)


@settings(max_examples=20, deadline=None)
@given(
    contents=st.lists(LINES, min_size=1, max_size=3),
    count=st.sampled_from([1, 2, 3]),
    rows=st.sampled_from([1, 3]),
    length=st.sampled_from([2, 11]),
)
def test_counters_and_bad_lines_are_a_function_of_the_place(tmp_path_factory, tokenizer, contents, count, rows, length):
    kinds = {"good": good("of the and"), "empty": good(""), "long": good(make_text(1, 40)), "bad": BAD, "blank": b" "}
    contents = [[*content, "good", "good", "good"] for content in contents]
    texts = [[kinds[kind] for kind in content] for content in contents]
    for lane in lanes_of(tmp_path_factory.mktemp("lane"), texts, count=count):
        of_lane = [  # (file, line, is bad) of the lines that count, in the lane's order
            (position, line, contents[int(Path(share.file.url).stem)][line] == "bad")
            for position, share in enumerate(lane.shares)
            for line, kind in enumerate(contents[int(Path(share.file.url).stem)])
            if line % share.modulus == share.residue and kind != "blank"
        ]
        packing = Packing(rows=rows, row_length=length, seed=3)
        made = list(islice(read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer), 9))
        for _, cursor in made:
            before = [bad for position, line, bad in of_lane if (position, line) < (cursor.file, cursor.line)]
            assert cursor.lines == cursor.epoch * len(of_lane) + len(before)
            assert cursor.bad == cursor.epoch * sum(bad for *_, bad in of_lane) + sum(before)
        for k, (_, cursor) in enumerate(made[:-1]):
            again = list(islice(read_blocks(lane, cursor, packing=packing, tokenizer=tokenizer), len(made) - k - 1))
            assert [after for _, after in again] == [after for _, after in made[k + 1 :]]
            assert [block.quarantined for block, _ in again] == [block.quarantined for block, _ in made[k + 1 :]]
        last = made[-1][1]
        seen = [bad for block, _ in made for bad in block.quarantined]
        assert len(set(seen)) == len(seen) == last.bad


def test_too_many_bad_lines_stop_the_run_from_any_cursor(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(quarantine, "JUDGED_FROM", 100)
    lines = [good("of")] * 30 + [BAD, b"5", b"[]", b"{}", BAD] + [good("and")] * 500
    packing = Packing(rows=1, row_length=8, seed=0)
    (strict,) = lanes_of(tmp_path, [lines], count=1, limit=0.04)
    made = []
    with pytest.raises(
        DataError,
        match=r"lane 0: 5 of 100 lines .* data\.max_bad_fraction 0\.04.*0\.jsonl, line 31: not JSON.*line 32: no text",
    ):
        made.extend(islice(read_blocks(strict, Cursor(), packing=packing, tokenizer=tokenizer), 250))
    with pytest.raises(DataError, match="lane 0: 5 of 100 lines"):
        list(islice(read_blocks(strict, made[-1][1], packing=packing, tokenizer=tokenizer), 250))
    (lenient,) = lanes_of(tmp_path, [lines], count=1, limit=0.05)
    *_, (_, cursor) = islice(read_blocks(lenient, Cursor(), packing=packing, tokenizer=tokenizer), 250)
    assert cursor.epoch
    assert cursor.bad >= 5


def test_a_lane_of_bad_lines_alone_is_an_error_that_shows_them(tmp_path):
    (lane,) = lanes_of(tmp_path, [[BAD, b"5"]], count=1)
    with pytest.raises(UserError, match=r"all its 2 lines are bad.*line 1: not JSON.*line 2: no text"):
        next(read_lane(lane, Cursor()))


def test_a_file_with_a_broken_end_is_still_an_error(tmp_path):
    path = tmp_path / "0.jsonl.gz"
    path.write_bytes(gzip.compress(good("a") + b"\n" + BAD)[:-3])
    (lane,) = cut_into_lanes(SOURCE, [File(str(path), path.stat().st_size)], lanes=1, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="truncated"):
        list(islice(read_lane(lane, Cursor()), 2))


def test_any_ranks_and_stops_find_the_same_bad_lines(tmp_path, tokenizer):
    for number in range(3):
        lines = [BAD if n % 5 == number else good(make_text(n, n)) for n in range(40)]
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    config = Config.model_validate(
        {
            "data": {
                "corpus": "standard_library", "files": f"{tmp_path}/*", "sequence_length": 13, "block_rows": 3,
                "lanes": 5, "max_bad_fraction": 0.5,
            },
            "train": {"steps": 1, "global_batch_size": 12, "micro_batch_size": 1},
        }
    )  # fmt: skip
    corpus = open_corpus(config.data)
    assert all(lane.max_bad_fraction == 0.5 for lane in corpus.lanes)

    def read(parts):
        found: list[Quarantined] = []
        cursors, consumed = None, 0
        for world, steps in parts:
            loaders = [
                Loader(
                    corpus, tokenizer, packing=packing_of(config), batch=12, micro_batch=1, rank=rank, world=world,
                    consumed=consumed, cursors=cursors,
                )
                for rank in range(world)
            ]  # fmt: skip
            for loader in loaders:
                *_, step = islice(loader, steps)
                found += loader.quarantined()
            consumed = step.consumed
            cursors = merge_cursors(loader.cursors(consumed) for loader in loaders)
            for loader in loaders:
                loader.close()
        return first_of(found), cursors

    straight, cursors = read([(1, 12)])
    assert len(straight) > 10
    assert [(each.lane, each.block, each.bad.epoch, each.bad.line) for each in straight] == sorted(
        (each.lane, each.block, each.bad.epoch, each.bad.line) for each in straight
    )
    assert {Path(each.bad.file).name for each in straight} == {f"{number}.jsonl" for number in range(3)}
    for parts in ([(3, 12)], [(2, 5), (1, 4), (4, 3)]):
        assert read(parts) == (straight, cursors)


def test_only_the_first_hundred_are_kept():
    bad = quarantine.bad_line(0, "f", 1, "r", b"x" * 900)
    found = [Quarantined(lane, block, bad) for lane in range(30) for block in range(10)]
    kept = first_of([*reversed(found), *found])
    assert kept == found[:100]
    assert bad.beginning == "x" * 200


def test_the_file_holds_the_first_ones_once_whatever_the_order_of_finding(tmp_path):
    found = [Quarantined(n % 3, n // 9, BadLine(0, "f", n, "not JSON", "{x")) for n in range(150)]
    straight, restarted = tmp_path / "straight.jsonl", tmp_path / "restarted.jsonl"
    write_first(straight, found)
    for part in (found[90:], found[:100], found[40:60]):
        write_first(restarted, part)
    assert restarted.read_bytes() == straight.read_bytes()
    rows = [json.loads(line) for line in straight.read_text().splitlines()]
    assert len(rows) == 100
    assert rows == sorted(rows, key=lambda row: (row["lane"], row["block"], row["line"]))
    assert rows[0]["line"] == found[0].bad.line + 1  # as in the warning
    assert not list(tmp_path.glob(".*"))
