"""Lines come whole, from any place, and a file that is too short is an error."""

import gzip
import os
import random
import resource
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lamda.config.errors import DataError, DataUnavailableError, UserError
from lamda.data import files
from lamda.data.card import Source
from lamda.data.files import File, decompressed_size, read_lines
from lamda.data.lanes import OPEN_FILES, Cursor
from lamda.data.partitioning import whole_lane
from lamda.data.resolving import resolve
from tests.conftest import make_text

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]
LINES = [b'{"text": "a"}', b"", b"x" * 700_000, "zwölf ▁ 字".encode(), b"last without newline"]


def store(folder: Path, content: bytes, suffix: str, *, frames: int = 1) -> File:
    cut = max(1, len(content) // frames)
    parts = [content[i : i + cut] for i in range(0, len(content), cut)] or [b""]
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = folder / f"file{suffix}"
    path.write_bytes(b"".join(map(pack, parts)))
    return File(str(path), path.stat().st_size)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lines_come_back_with_their_numbers_and_offsets(tmp_path, suffix, frames):
    content = b"\n".join(LINES)
    lines = list(read_lines(store(tmp_path, content, suffix, frames=frames)))
    assert [line.data for line in lines] == LINES
    assert [line.number for line in lines] == list(range(len(LINES)))
    assert all(content[line.byte :].startswith(line.data) for line in lines)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_line_says_about_where_it_is_stored_and_a_file_how_long_it_is(tmp_path, suffix, frames):
    content = "".join(make_text(n, 40).replace("\n", "") + "\n" for n in range(5000)).encode()
    file = store(tmp_path, content, suffix, frames=frames)
    assert decompressed_size(file) == len(content)
    lines = list(read_lines(file))
    stored = [line.stored for line in lines]
    assert stored == sorted(stored)
    assert all(abs(line.stored / file.size - line.byte / len(content)) < 0.2 for line in lines)
    assert suffix != ".jsonl" or stored == [line.byte for line in lines]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_where_a_line_is_stored_depends_on_the_file_alone(tmp_path, monkeypatch, suffix):
    """Windows of the order follow it, so that neither a server's pieces nor the place of a resume may change it."""
    content = "".join(make_text(n, n % 90).replace("\n", "") + "\n" for n in range(3000)).encode()
    file = store(tmp_path, content, suffix, frames=3)
    whole = list(read_lines(file))
    for line in whole[1 :: len(whole) // 40]:
        assert next(read_lines(file, number=line.number, byte=line.byte)) == line
    data, draw = Path(file.url).read_bytes(), random.Random(0)
    cuts = [0, *sorted(draw.sample(range(1, file.size), 60)), file.size]
    pieces = [data[start:stop] for start, stop in pairwise(cuts)]
    monkeypatch.setattr(files, "_read", lambda file, start: iter(pieces))
    assert list(read_lines(file)) == whole


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_continues_from_any_line(tmp_path, suffix):
    file = store(tmp_path, b"\n".join(LINES), suffix)
    whole = list(read_lines(file))
    for place, line in enumerate(whole):
        assert list(read_lines(file, number=line.number, byte=line.byte)) == whole[place:]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_file_is_an_error_and_never_an_early_end(tmp_path, suffix, cut):
    file = store(tmp_path, b"\n".join(LINES), suffix)
    path = Path(file.url)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="truncated"):
        list(read_lines(File(file.url, path.stat().st_size)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_shorter_than_its_size_is_an_error(tmp_path, suffix):
    file = store(tmp_path, b"\n".join(LINES), suffix)
    with pytest.raises((DataError, DataUnavailableError), match=r"bytes could be read"):
        list(read_lines(File(file.url, file.size + 1)))


def test_damaged_compressed_data_is_an_error_that_names_the_file(tmp_path):
    file = store(tmp_path, b"\n".join(LINES) * 50, ".jsonl.zst")
    content = bytearray(Path(file.url).read_bytes())
    content[0] ^= 0xFF
    Path(file.url).write_bytes(content)
    with pytest.raises(DataError, match=r"file\.jsonl\.zst"):
        list(read_lines(file))


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=20))
def test_any_lines_round_trip(tmp_path_factory, lines):
    file = store(tmp_path_factory.mktemp("lines"), b"".join(line + b"\n" for line in lines), ".jsonl.zst")
    assert [line.data for line in read_lines(file)] == lines


def test_files_are_resolved_in_one_order_with_their_sizes(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(b"1234")
    source = Source(name="s", license="none", files=(f"{tmp_path}/b*", f"{tmp_path}/*.jsonl"))
    assert [(Path(file.url).name, file.size) for file in resolve(source)] == [
        ("a.jsonl", 4),
        ("b.jsonl", 4),
        ("c.jsonl", 4),
    ]


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\*\.jsonl"):
        resolve(Source(name="s", license="none", files=(f"{tmp_path}/nothing*.jsonl",)))
    (tmp_path / "text.doc").write_bytes(b"")
    with pytest.raises(UserError, match=r"text\.doc"):
        resolve(Source(name="s", license="none", files=(f"{tmp_path}/text.doc",)))


@pytest.mark.parametrize("target", ["gone.jsonl", "b.jsonl"], ids=["missing", "itself"])
def test_a_link_that_leads_nowhere_is_named_and_never_left_out(tmp_path, target):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    (tmp_path / "b.jsonl").symlink_to(target)
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
        resolve(Source(name="s", license="none", files=(f"{tmp_path}/*.jsonl",)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_byte_order_mark_is_no_text_and_moves_no_offset(tmp_path, suffix):
    content = b"\xef\xbb\xbf" + b'{"text": "a"}\n' * 2 + b"\xef\xbb\xbf" + b'{"text": "b"}'  # two files, joined
    file = store(tmp_path, content, suffix)
    whole = list(read_lines(file))
    assert [line.data for line in whole] == [b'{"text": "a"}'] * 2 + [b'{"text": "b"}']
    assert [line.byte for line in whole] == [0, 17, 31]
    for place, line in enumerate(whole):
        assert list(read_lines(file, number=line.number, byte=line.byte)) == whole[place:]


def test_a_frame_with_a_long_window_is_read(tmp_path):
    path = tmp_path / "long.jsonl.zst"
    window = bytes([31 - 10 << 3])
    block = (4 << 3 | 1).to_bytes(3, "little") + b"a\nb\n"  # stored as it is, the last
    path.write_bytes(b"\x28\xb5\x2f\xfd\0" + window + block)
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert [line.data for line in read_lines(File(str(path), path.stat().st_size))] == [b"a", b"b"]


@pytest.mark.parametrize("zeros", [1, 512, 9000])
def test_zeros_after_a_gzip_member_are_padding(tmp_path, zeros):
    path = tmp_path / "padded.jsonl.gz"
    member = gzip.compress(b"a\n")
    path.write_bytes(member + bytes(zeros) + member + bytes(zeros))
    assert [line.data for line in read_lines(File(str(path), path.stat().st_size))] == [b"a", b"a"]
    path.write_bytes(member + b"\1")
    with pytest.raises(DataError, match=r"padded\.jsonl\.gz"):
        list(read_lines(File(str(path), path.stat().st_size)))


def test_a_line_that_inflates_enormously_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    file = store(tmp_path, bytes(1 << 28), ".jsonl.zst")
    assert file.size < 1 << 15
    tracemalloc.start()
    try:
        (line,) = read_lines(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(line.data) == (1 << 20) + 1
    assert peak < 150 << 20


def test_names_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "a[1]::b__" / "__c"
    odd.mkdir(parents=True)
    for name in ("part[1].jsonl", "x::y.jsonl", ".hidden.jsonl", "README.md"):
        (odd / name).write_bytes(b'{"text": "a"}\n')
    monkeypatch.chdir(odd)
    seen = [str(odd / "part[1].jsonl"), str(odd / "x::y.jsonl")]

    def found(*patterns):
        return [file.url for file in resolve(Source(name="s", license="none", files=patterns))]

    assert found("*.jsonl") == found("*") == seen
    assert found("part[1].jsonl", str(odd / "x::y.jsonl")) == seen
    assert found("~/*/__c/part*") == seen[:1]
    assert found(".*.jsonl") == [str(odd / ".hidden.jsonl")]
    with pytest.raises(UserError, match="no file matches"):
        found("~/*/*/part*")  # as `__pycache__`: only where the pattern says so
    assert [line.data for file in seen for line in read_lines(File(file, 14))] == [b'{"text": "a"}'] * 2


def test_too_many_open_files_say_what_helps(tmp_path):
    file = store(tmp_path, b"a", ".jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(tmp_path, os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        with pytest.raises(DataError, match=r"file\.jsonl: .*`ulimit -n`"):
            list(read_lines(file))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)


def test_lanes_may_have_as_many_files_open_as_the_system_allows(tmp_path):
    file = store(tmp_path, b'{"text": "a"}', ".jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(tmp_path, os.O_RDONLY)
    lane = whole_lane(Source(name="s", license="none", files=("x",)), file)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        assert [document.text for document in lane.read(Cursor())] == ["a"]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(OPEN_FILES, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)


def test_what_a_library_raises_on_a_look_up_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[Errno -3] Temporary failure in name resolution\nmore")

    monkeypatch.setattr("datasets.data_files.resolve_pattern", fail)
    with pytest.raises(DataError, match=r"a/b/\*: cannot be looked up \(RuntimeError: \[Errno -3\].*proxy"):
        resolve(Source(name="s", license="none", files=("hf://datasets/a/b/*",)))
