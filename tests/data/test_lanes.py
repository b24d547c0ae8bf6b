"""A source is cut into lanes by its text, whatever its files; together they hold every document once."""

import gzip
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import DataError, UserError
from lamda.data import files, parquet, partitioning
from lamda.data.card import Source
from lamda.data.documents import Document
from lamda.data.files import File
from lamda.data.lanes import Cursor
from lamda.data.partitioning import cut_into_lanes
from tests.conftest import make_text, write_shard
from tests.data.ranks import BAD, BLANK, SINGLE, SUFFIXES, write_file

SOURCE = Source(name="s", license="none", files=("x",))
LINES = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([BAD, BLANK, 900])), min_size=1, max_size=9)


def file_of(path):
    return File(str(path), path.stat().st_size)


def cut(files, *, sequence_length=1, **more):
    found = [file_of(path) for path in files]
    return cut_into_lanes(SOURCE, found, sequence_length=sequence_length, max_bad_line_fraction=1, **more)


@settings(max_examples=120, deadline=None)
@given(
    files=st.lists(st.tuples(st.sampled_from(SUFFIXES), LINES), min_size=1, max_size=4),
    most=st.sampled_from([1, 3, 64]),
    cut_compressed=st.sampled_from([0, 1 << 20]),
)
def test_lanes_hold_every_document_once_and_each_in_its_place(tmp_path_factory, files, most, cut_compressed):
    folder, texts, number = tmp_path_factory.mktemp("files"), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "MIN_ROWS_PER_LANE", 1)
        patch.setattr(partitioning, "CUT_COMPRESSED", (cut_compressed, 1 << 20))
        paths = []
        for name, (suffix, drawn) in enumerate(files):
            kinds = [3] if suffix in SINGLE else drawn
            content = []
            for kind in kinds:
                number += 1
                content.append(kind if isinstance(kind, str) else [number] * kind)
            paths.append(folder / f"{name}{suffix}")
            write_file(paths[-1], content)
            texts += [" ".join(map(str, line)) for line in content if not isinstance(line, str)]
        made = cut(paths, max_lanes=most)
        assert [lane.index for lane in made] == list(range(len(made)))
        assert len(made) <= most
        found = []
        for lane in made:
            documents = [entry for entry in lane.read(Cursor()) if isinstance(entry, Document)]
            found += [document.text for document in documents]
            ends = [0] + [place for document in documents for place in (document.begin, document.end)]
            assert ends == sorted(ends) or any(share.is_estimated or share.modulus > 1 for share in lane.slices)
            for document in documents:
                share = lane.slices[document.file]
                assert 0 <= document.begin <= document.end <= lane.axis_length
                again = lane.read(Cursor(file=document.file, line=document.line, byte=document.byte))
                assert next(again) == document, share
        assert sorted(found) == sorted(texts)
        if all(share.modulus == 1 for lane in made for share in lane.slices):
            assert found == texts


def test_lanes_are_equal_parts_of_all_text_however_it_is_stored(tmp_path):
    texts = [make_text(n, 60) for n in range(200)]
    paths = [write_shard(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl")]
    paths[2].write_bytes(b"".join(paths[2].read_bytes().splitlines(True)[:1]))
    found = cut(paths, sequence_length=2, max_lanes=40)
    assert len(found) == 40
    lengths = [lane.axis_length for lane in found]
    assert max(lengths) - min(lengths) <= 1
    assert sum(lengths) == 2 * paths[0].stat().st_size + paths[2].stat().st_size


def test_small_sources_have_few_lanes_and_large_ones_64(tmp_path):
    path = write_shard(tmp_path / "a.jsonl", [make_text(n, 60) for n in range(200)])
    size = path.stat().st_size
    assert len(cut([path], sequence_length=size // (64 * 4 * 3))) == 3
    assert len(cut([path], sequence_length=size)) == len(cut([path], max_lanes=1)) == 1
    assert len(cut([path] * 10)) == 64


@pytest.mark.parametrize(("groups", "expected"), [(1, 8), (2, 16), (8, 64), (100, 64)])
def test_lanes_in_parquet_are_few_for_its_row_groups_and_begin_with_their_own_rows(
    tmp_path, monkeypatch, groups, expected
):
    rows, made = 25_600, 0

    def records_of(batch):
        nonlocal made
        made += batch.num_rows
        return batch.to_pylist()

    monkeypatch.setattr(partitioning, "MIN_ROWS_PER_LANE", 1)
    monkeypatch.setattr(parquet, "records_of", records_of)
    texts = pa.table({"text": [str(n) for n in range(rows)]})
    pq.write_table(texts, tmp_path / "a.parquet", row_group_size=rows // groups)
    found = cut([tmp_path / "a.parquet"])
    assert len(found) == expected
    for lane in found:
        next(lane.read(Cursor()))
    assert made <= expected * parquet.BATCH
    lengths = [sum(1 for _ in lane.read(Cursor())) for lane in found]
    assert max(lengths) - min(lengths) <= 1
    assert sum(lengths) == rows


def test_a_small_file_of_one_row_group_takes_no_lanes_from_the_rest(tmp_path):
    paths = [write_shard(tmp_path / "a.jsonl", [make_text(n, 60) for n in range(3000)]), tmp_path / "b.parquet"]
    pq.write_table(pa.table({"text": [make_text(n, 60) for n in range(200)]}), paths[1])
    assert len(cut(paths)) == 64


def test_a_lane_reads_its_part_alone_of_a_file_with_a_sha256(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.jsonl", [make_text(n, 60) for n in range(9000)])
    wrong = replace(file_of(path), sha256="0" * 64)
    read, stored = 0, files._read

    def counted(file, start):
        nonlocal read
        for chunk in stored(file, start):
            read += len(chunk)
            yield chunk

    monkeypatch.setattr(files, "_read", counted)
    monkeypatch.setattr(files, "CHUNK", 1 << 12)
    found = cut_into_lanes(SOURCE, [wrong], sequence_length=1)
    assert len(found) == 64
    assert sum(1 for lane in found for _ in lane.read(Cursor())) == 9000
    assert read <= path.stat().st_size + 64 * (2 << 12)
    with pytest.raises(DataError, match="its sha256 is"):
        list(cut_into_lanes(SOURCE, [wrong], sequence_length=1, max_lanes=1)[0].read(Cursor()))


def test_files_that_are_not_cut_give_their_lines_in_turn_to_eight_lanes(tmp_path, monkeypatch):
    monkeypatch.setattr(partitioning, "CUT_COMPRESSED", (0, 1 << 30))
    paths = [write_shard(tmp_path / f"{n}.jsonl.zst", [make_text(n, 900)] * 40) for n in range(3)]
    found = cut(paths)
    assert len(found) == 9
    for number, lane in enumerate(found):
        (share,) = lane.slices
        assert (Path(share.file.url).name[0], share.residue, share.modulus) == (str(number // 3), number % 3, 3)
    many = cut(paths * 10, max_lanes=20)
    assert [(share.residue, share.modulus) for lane in many for share in lane.slices] == [(0, 1)] * 30
    assert len(many) == 20


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_the_places_of_lines_in_a_large_compressed_file_are_by_its_stored_bytes(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(partitioning, "CUT_COMPRESSED", (0, 0))
    plain = write_shard(tmp_path / "a.jsonl", [make_text(n, 200) for n in range(3000)])
    pack = gzip.compress if suffix == ".jsonl.gz" else zstandard.compress
    (tmp_path / f"a{suffix}").write_bytes(pack(plain.read_bytes()))
    (lane,) = cut([tmp_path / f"a{suffix}"], max_lanes=1)
    places = [document.begin / lane.axis_length for document in lane.read(Cursor())]
    assert places == sorted(places)
    assert max(abs(place - n / 3000) for n, place in enumerate(places)) < 0.15


def test_a_source_without_files_is_refused_by_name():
    with pytest.raises(UserError, match="source 's' has no file"):
        cut([])


def test_a_source_of_empty_files_is_refused_by_name_and_not_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    for names in (["a.jsonl"], ["b.jsonl.zst"], ["c.parquet"], ["a.jsonl", "b.jsonl.zst", "c.parquet"]):
        with pytest.raises(UserError, match=f"source 's' has no document: nothing is in .*{names[0]}"):
            cut([tmp_path / name for name in names])


def test_a_document_is_named_by_its_line_or_by_its_byte_where_its_lane_begins_inside_the_file(tmp_path):
    path = write_shard(tmp_path / "a.jsonl", [str(n) for n in range(3000)])
    found = cut([path], max_lanes=20)
    assert len(found) == 20
    for lane in found:
        for document in islice(lane.read(Cursor()), 3):
            share = lane.slices[document.file]
            shown = share.place(document.line, document.byte)
            assert shown == f"{path}, " + (f"byte {document.byte:,}" if share.start else f"line {document.line + 1}")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_local_text_needs_no_cache_that_can_be_written(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/no-folder"))
    path, texts = tmp_path / f"0.{suffix}", [make_text(n, 9) for n in range(5)]
    write_shard(path, texts) if suffix == "jsonl" else pq.write_table(pa.table({"text": texts}), path)
    (lane,) = cut([path], max_lanes=1)
    assert [entry.text for entry in lane.read(Cursor())] == texts
