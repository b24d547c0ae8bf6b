"""A line without a document is counted once, kept for a look, and never ends a run silently."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data import files, lanes, partitioning, quarantine
from lamda.data.blocks import LaneReader, Packing, Part
from lamda.data.card import Source
from lamda.data.corpus import open_corpus, require_a_batch
from lamda.data.documents import Document
from lamda.data.files import DataError, File, read_lines
from lamda.data.held_out import require_documents
from lamda.data.lanes import RAW_TEXT, Cursor
from lamda.data.partitioning import cut_into_lanes
from lamda.data.quarantine import BadLine, Quarantined, QuarantineFile, few, first_of
from tests.conftest import make_text
from tests.data.ranks import read

SOURCE = Source(name="s", license="none", files=("x",), domain="meta.pile_set_name")
BAD = b"{not json}"


def good(text, domain="d"):
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode()


def lanes_of(folder: Path, contents, *, count=1, limit=1.0):
    """Lanes over .jsonl files of these lines."""
    made = []
    for number, lines in enumerate(contents):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        made.append(path)
    return cut(*made, count=count, limit=limit)


def cut(*paths: Path, count=1, limit=1.0):
    found = [File(str(path), path.stat().st_size) for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "MIN_ROWS_PER_LANE", 1)
        return cut_into_lanes(SOURCE, found, sequence_length=1, max_lanes=count, max_bad_line_fraction=limit)


def entries(lane):
    return list(lane.read(Cursor()))


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
def test_a_line_without_a_document_is_reported_with_its_place_and_reason(tmp_path, line, reason):
    (lane,) = lanes_of(tmp_path, [[good("a"), b"", b"  ", line, good("b")]])
    first, bad, second = entries(lane)
    assert (first.text, second.text) == ("a", "b")
    assert bad.place == f"{tmp_path / '0.jsonl'}, line 4"
    assert bad.reason.startswith(reason)
    assert bad.beginning == line.decode("utf-8", "backslashreplace")


def test_a_bad_line_of_a_lane_that_begins_inside_a_file_has_its_byte_as_its_place(tmp_path):
    lines = [BAD if n % 50 == 33 else good(make_text(n, 9)) for n in range(400)]
    found = lanes_of(tmp_path, [lines], count=5)
    assert len(found) == 5
    data = (tmp_path / "0.jsonl").read_bytes()
    places = [bad.place for lane in found for bad in entries(lane) if isinstance(bad, BadLine)]
    assert len(places) == 8
    for place in places:
        kind, number = place.removeprefix(f"{tmp_path / '0.jsonl'}, ").replace(",", "").split()
        start = int(number) if kind == "byte" else len(b"".join(data.splitlines(True)[: int(number) - 1]))
        assert data[start:].startswith(BAD)
    assert {place.split(", ")[1].split()[0] for place in places} == {"byte", "line"}


def config_of(folder: Path) -> Config:
    return Config.model_validate(
        {
            "data": {"corpus": "standard_library", "files": f"{folder}/*", "sequence_length": 8},
            "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
        }
    )


def test_text_under_another_key_is_answered_with_the_keys_that_there_are_and_the_remedy(tmp_path, tokenizer):
    (tmp_path / "0.jsonl").write_bytes(b'{"content": "a", "meta": {}}\n' * 3)
    with pytest.raises(UserError, match=r"none of 3 lines.*its keys are 'content', 'meta'\).*a card whose `text:`"):
        require_a_batch(open_corpus(config_of(tmp_path).data), config_of(tmp_path), tokenizer)


def test_a_parquet_file_without_the_column_is_answered_with_those_that_it_has(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"no column 'text'.* \(the file has 'content', 'id'\)"):
        require_a_batch(open_corpus(config_of(tmp_path).data), config_of(tmp_path), tokenizer)


def test_strange_names_of_keys_are_cut_short():
    assert few(["k" * 100, *map(str, range(20))]) == f"'{'k' * 40}...', '0', '1', '2', '3', '4', '5', '6', ..."


def test_a_missing_domain_is_unknown_and_not_bad(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "b", "meta": null}', b'{"text": "c", "meta": {"pile_set_name": 3}}']
    (lane,) = lanes_of(tmp_path, [lines])
    assert [(document.text, document.domain) for document in entries(lane)] == [(text, "unknown") for text in "abc"]


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
    (lane,) = cut(path)
    found = entries(lane)
    assert [entry.line for entry in found[::2]] == [0, 2, 4]
    assert [entry.place for entry in found[1::2]] == [f"{path}, line 2", f"{path}, line 4"]
    assert found[1].beginning == content[1][:200].decode()


def test_a_row_of_parquet_without_text_is_bad(tmp_path):
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    (lane,) = cut(path)
    first, bad, second = entries(lane)
    assert (first.text, second.text, bad.place) == ("a", "b", f"{path}, line 2")
    assert bad.beginning == "{'text': None}"


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"[Infinity, NaN]"])
def test_a_number_that_json_does_not_know_costs_no_document(tmp_path, number):
    line = b'{"text": "a \xc3\xbc NaN", "id": 123456789012345678901234567890, "score": ' + number
    (lane,) = lanes_of(tmp_path, [[line + b"}", line, line[:-1] + b'"\\ud800", "x": NaN}', good("b")]])
    first, *bad, second = entries(lane)
    assert (first.text, second.text) == ("a \u00fc NaN", "b")
    assert [(each.place.split()[-1], each.reason[:8]) for each in bad] == [("2", "not JSON"), ("3", "not JSON")]


def parquet(path: Path, columns, **fields) -> Path:
    pq.write_table(pa.table(columns), path, **fields)
    return path


def test_only_the_needed_columns_of_parquet_are_read(tmp_path):
    odd = {
        "pairs": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "id": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 3, pa.binary(16))),
        "day": pa.array([2**60] * 3, pa.timestamp("us")),
    }
    file = parquet(
        tmp_path / "part[1]::x.parquet", {"text": ["a", "b", "c"], "meta": [{"pile_set_name": "p"}] * 3} | odd
    )
    (lane,) = cut(file)
    assert [(row.text, row.domain) for row in entries(lane)] == [(text, "p") for text in "abc"]


def test_text_of_parquet_that_cannot_be_decoded_is_one_bad_line(tmp_path):
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")]
    )
    (lane,) = cut(parquet(tmp_path / "0.parquet", {"text": text}))
    first, bad, second = entries(lane)
    assert (first.text, second.text) == ("a", "b")
    assert (bad.place.split()[-1], bad.reason[:17]) == ("2", "cannot be decoded")


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = parquet(tmp_path / "0.parquet", {"text": ["a"]})
    (lane,) = cut(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for failing in (lambda: cut(file), lambda: entries(lane)):
        with pytest.raises(DataError, match=r"0\.parquet: cannot be read as parquet"):
            failing()


EMPTY = [(".jsonl", b""), (".jsonl.gz", gzip.compress(b" \n\n", mtime=0)), (".parquet", None)]


@pytest.mark.parametrize(("suffix", "content"), EMPTY)
def test_a_file_without_text_is_nothing_beside_others_and_held_out_alone_is_refused(tmp_path, suffix, content):
    (path,), other = [tmp_path / f"0{suffix}"], tmp_path / "1.jsonl"
    if content is None:
        parquet(path, {"text": pa.array([], pa.string())})
    else:
        path.write_bytes(content)
    other.write_bytes(good("a") + b"\n" + good("b") + b"\n")
    assert [entry.text for lane in cut(path, other, count=8) for entry in entries(lane)] == ["a", "b"]
    source = Source(name="s", license="none", files=(str(path),))
    with pytest.raises(DataError, match=r"holds no document"):
        require_documents(source, form=RAW_TEXT, on_wait=lambda: None)


LINES = st.lists(st.sampled_from(["good", "empty", "long", "bad", "blank"]), min_size=1, max_size=14)


@settings(max_examples=20, deadline=None)
@given(
    contents=st.lists(LINES, min_size=1, max_size=3),
    count=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([2, 11]),
    ends=st.lists(st.floats(0, 1), max_size=5),
)
def test_counters_and_bad_lines_are_a_function_of_the_place(tmp_path_factory, tokenizer, contents, count, length, ends):
    kinds = {"good": good("of the and"), "empty": good(""), "long": good(make_text(1, 40)), "bad": BAD, "blank": b" "}
    texts = [[kinds[kind] for kind in content] for content in contents]
    seen = []
    for lane in lanes_of(tmp_path_factory.mktemp("lane"), texts, count=count):
        of_lane = entries(lane)
        order = [  # (file, line) of each document, the lines before it and the bad ones among them
            (entry.file, entry.line, number, sum(isinstance(each, BadLine) for each in of_lane[:number]))
            for number, entry in enumerate(of_lane)
            if isinstance(entry, Document)
        ]
        reader, start, made = LaneReader(lane, tokenizer, Packing(length)), Cursor(), []
        for target in [*(int(end * lane.axis_length) for end in sorted(ends)), None]:
            part = Part(0, start, target)
            made.append((part, reader.read(part)))
            start = made[-1][1].after
        for part, rows in made:
            cursor = rows.after
            assert cursor == Cursor() or (cursor.file, cursor.line, cursor.lines, cursor.bad) in order
            again = LaneReader(lane, tokenizer, Packing(length)).read(part)
            assert (again.after, again.block.quarantined) == (rows.after, rows.block.quarantined)
        found = [bad for _, rows in made for bad in rows.block.quarantined]
        assert found == [entry for entry in of_lane if isinstance(entry, BadLine)]
        seen += found
    assert len(set(seen)) == len(seen) == sum(kind == "bad" for content in contents for kind in content)


def test_too_many_bad_lines_stop_the_run_from_any_cursor(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(quarantine, "CHECKED_FROM", 100)
    lines = [good("of")] * 30 + [BAD, b"5", b"[]", b"{}", BAD] + [good("and")] * 500
    (strict,) = lanes_of(tmp_path, [lines], limit=0.04)
    message = r"lane 0: 5 of 100 lines .* data\.max_bad_line_fraction 0\.04"
    reader = LaneReader(strict, tokenizer, Packing(8))
    monkeypatch.setattr("lamda.data.spans.ENCODE_CHARACTERS", 100)
    first = reader.read(Part(0, Cursor(), strict.axis_length // 8))
    assert first.after.bad == 5
    with pytest.raises(DataError, match=rf"{message}.*0\.jsonl, line 31: not JSON.*line 32: no text"):
        LaneReader(strict, tokenizer, Packing(8)).read(Part(0, Cursor(), None))
    with pytest.raises(DataError, match=message):
        LaneReader(strict, tokenizer, Packing(8)).read(Part(0, first.after, None))
    with pytest.raises(DataError, match=message):
        reader.read(Part(0, first.after, None))
    (lenient,) = lanes_of(tmp_path, [lines], limit=0.05)
    assert LaneReader(lenient, tokenizer, Packing(8)).read(Part(0, Cursor(), None)).after.bad == 5


def test_text_of_bad_lines_alone_is_an_error_that_shows_them(tmp_path, tokenizer):
    (tmp_path / "0.jsonl").write_bytes(BAD + b"\n5\n")
    with pytest.raises(UserError, match=r"none of 2 lines holds a document\..*line 1: not JSON.*line 2: no text"):
        require_a_batch(open_corpus(config_of(tmp_path).data), config_of(tmp_path), tokenizer)


def test_a_file_with_a_broken_end_is_still_an_error(tmp_path, monkeypatch):
    path = tmp_path / "0.jsonl.gz"
    path.write_bytes(gzip.compress(good("a") + b"\n" + BAD)[:-3])
    with pytest.raises(DataError, match="truncated"):
        cut(path, count=2)
    monkeypatch.setattr(partitioning, "CUT_COMPRESSED", (0, 0))
    (lane,) = cut(path)
    with pytest.raises(DataError, match="truncated"):
        entries(lane)


def test_any_ranks_and_stops_find_the_same_bad_lines(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(partitioning, "MIN_ROWS_PER_LANE", 20)
    monkeypatch.setattr("lamda.data.windows.FIRST_TOKENS", 300)
    for number in range(3):
        lines = [BAD if n % 5 == number else good(make_text(n, n)) for n in range(40)]
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    config = Config.model_validate(
        {
            "data": {
                "corpus": "standard_library", "files": f"{tmp_path}/*", "sequence_length": 12, "shuffle": 40,
                "max_bad_line_fraction": 0.5,
            },
            "train": {"steps": 1, "global_batch_size": 12, "micro_batch_size": 1},
        }
    )  # fmt: skip
    corpus = open_corpus(config.data)
    assert len(corpus.lanes) > 4
    assert all(lane.max_bad_line_fraction == 0.5 for lane in corpus.lanes)
    straight = read(config, corpus, tokenizer, until=lambda step: step.epochs["files"] >= 1)
    count = len(straight.digests)
    assert sorted({each.bad.place.split(",")[0] for each in straight.quarantined}) == [
        str(tmp_path / f"{number}.jsonl") for number in range(3)
    ]
    assert len(straight.quarantined) == 24
    assert straight.quarantined == sorted(set(straight.quarantined))
    assert read(config, corpus, tokenizer, count=count, world_size=3).quarantined == straight.quarantined
    run, found = None, []
    for world in (2, 1, 4, 2):
        run = read(config, corpus, tokenizer, count=-(-count // 4), world_size=world, after=run)
        found += run.quarantined
    assert first_of(found) == straight.quarantined


def test_only_the_first_hundred_are_kept():
    found = [
        Quarantined(lane, BadLine.of(f"f, line {line}", "r", b"x" * 900)) for lane in range(30) for line in range(1, 10)
    ]
    kept = first_of([*reversed(found), *found])
    assert kept == found[:100]
    assert kept[0].bad.beginning == "x" * 200


def test_the_file_holds_the_first_ones_once_whatever_the_order_of_finding(tmp_path):
    found = [Quarantined(n % 3, BadLine(f"f, line {n:03}", "not JSON", "{x")) for n in range(150)]
    straight, restarted = tmp_path / "straight.jsonl", tmp_path / "restarted.jsonl"
    QuarantineFile(straight).add(found)
    for part in (found[90:], found[:100], found[40:60]):
        QuarantineFile(restarted).add(part)
    assert restarted.read_bytes() == straight.read_bytes()
    rows = [json.loads(line) for line in straight.read_text().splitlines()]
    assert len(rows) == 100
    assert rows == sorted(rows, key=lambda row: (row["lane"], row["place"]))
    assert rows[0] == {"lane": 0, "place": "f, line 000", "reason": "not JSON", "beginning": "{x"}
    assert QuarantineFile(straight).add(found) == []
    assert not list(tmp_path.glob(".*"))
