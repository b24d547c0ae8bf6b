"""Lines come whole, from any place, and a file that is too short is an error."""

import gzip
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.data.card import Source
from lamda.data.files import DataError, File, read_lines, resolve

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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_goes_on_from_any_line(tmp_path, suffix):
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
    with pytest.raises(DataError, match=r"bytes could be read"):
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
    source = Source(name="s", licence="none", files=(f"{tmp_path}/b*", f"{tmp_path}/*.jsonl"))
    assert [(Path(file.url).name, file.size) for file in resolve(source)] == [
        ("a.jsonl", 4),
        ("b.jsonl", 4),
        ("c.jsonl", 4),
    ]


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\*\.jsonl"):
        resolve(Source(name="s", licence="none", files=(f"{tmp_path}/nothing*.jsonl",)))
    (tmp_path / "text.doc").write_bytes(b"")
    with pytest.raises(UserError, match=r"text\.doc"):
        resolve(Source(name="s", licence="none", files=(f"{tmp_path}/text.doc",)))
