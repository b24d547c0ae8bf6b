import io
import json
import lzma
import random
import sysconfig
from pathlib import Path

import pytest
import zstandard

from lamda.config.errors import UserError
from lamda.data import standard_library
from lamda.data.compression import compressed_bits_per_byte
from lamda.data.standard_library import write_corpus

SHARDS = 3


def make_library(folder):
    """A library of 400 small files with every case that the reader has to meet."""
    for number in range(400):
        parent = folder / ("package/test" if number % 2 else "package")
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"module_{number}.py").write_text(f"NUMBER = {number}\n" * (1 + number % 7))
    (folder / "empty.py").write_text("")
    (folder / "latin.py").write_bytes("# coding: latin-1\nNAME = 'é'\n".encode("latin-1"))
    (folder / "broken.py").write_bytes(b"NAME = '\xff'\n")
    (folder / "unknown.py").write_bytes(b"# coding: no-such-encoding\n")
    (folder / "site-packages").mkdir()
    (folder / "site-packages/other.py").write_text("OTHER = 1\n")


@pytest.fixture
def library(tmp_path, monkeypatch):
    folder = tmp_path / "library"
    make_library(folder)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(folder)}.__getitem__)
    return folder


def read(path):
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        return [json.loads(line) for line in io.TextIOWrapper(stream, "utf-8", newline="\n")]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_readable_source_is_in_exactly_one_file(library, tmp_path):
    write_corpus(tmp_path / "corpus", shards=SHARDS)
    shards = [tmp_path / f"corpus/train/{shard:02}.jsonl.zst" for shard in range(SHARDS)]
    assert sorted((tmp_path / "corpus/train").iterdir()) == shards
    train, held_out = [read(shard) for shard in shards], read(tmp_path / "corpus/val.jsonl.zst")
    found = sorted(document["text"] for part in (*train, held_out) for document in part)
    expected = [path.read_text() for path in (library / "package").rglob("*.py")]
    assert found == sorted([*expected, "# coding: latin-1\nNAME = 'é'\n"])
    assert max(map(len, train)) - min(map(len, train)) <= 1
    assert 0.01 * len(found) < len(held_out) < 0.08 * len(found)


def test_domains_tell_tests_from_library(library, tmp_path):
    write_corpus(tmp_path / "corpus", shards=1)
    domains = {doc["text"]: doc["meta"]["pile_set_name"] for doc in read(tmp_path / "corpus/train/00.jsonl.zst")}
    for path in (library / "package").rglob("*.py"):
        expected = "Python tests" if path.parent.name == "test" else "Python library"
        assert domains.get(path.read_text(), expected) == expected
    assert set(domains.values()) == {"Python tests", "Python library"}


def test_held_out_files_stay_held_out_when_the_library_grows(library, tmp_path):
    write_corpus(tmp_path / "before", shards=SHARDS)
    (library / "new.py").write_text("NEW = 1\n")
    write_corpus(tmp_path / "after", shards=SHARDS)
    before = {doc["text"] for doc in read(tmp_path / "before/val.jsonl.zst")}
    after = {doc["text"] for doc in read(tmp_path / "after/val.jsonl.zst")}
    assert before <= after <= before | {"NEW = 1\n"}


def test_same_library_gives_the_same_files(library, tmp_path):
    write_corpus(tmp_path / "one", shards=SHARDS)
    write_corpus(tmp_path / "two", shards=SHARDS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_finished_corpus_is_left_alone(library, tmp_path):
    write_corpus(tmp_path / "corpus", shards=SHARDS)
    before = contents(tmp_path / "corpus")
    (library / "new.py").write_text("NEW = 1\n")
    write_corpus(tmp_path / "corpus", shards=SHARDS)
    assert contents(tmp_path / "corpus") == before


def test_interrupted_corpus_is_completed(library, tmp_path, monkeypatch):
    write = standard_library.write_file

    def interrupted(path, content):
        if path.name == "02.jsonl.zst":
            write(path, content[:10])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(standard_library, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "corpus", shards=SHARDS)
    assert not (tmp_path / "corpus").exists()
    monkeypatch.setattr(standard_library, "write_file", write)
    write_corpus(tmp_path / "corpus", shards=SHARDS)
    write_corpus(tmp_path / "reference", shards=SHARDS)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "reference")
    assert {path.name for path in tmp_path.iterdir()} == {"library", "corpus", "reference"}


def test_a_process_that_is_second_takes_what_the_first_one_made(library, tmp_path, monkeypatch):
    write = standard_library._write

    def overtaken(folder, *, shards):
        write(folder, shards=shards)
        with monkeypatch.context() as patch:
            patch.setattr(standard_library, "_write", write)
            write_corpus(tmp_path / "corpus", shards=SHARDS)

    monkeypatch.setattr(standard_library, "_write", overtaken)
    write_corpus(tmp_path / "corpus", shards=SHARDS + 1)
    assert len(list((tmp_path / "corpus/train").iterdir())) == SHARDS
    assert {path.name for path in tmp_path.iterdir()} == {"library", "corpus"}


def test_other_folder_is_refused_and_untouched(library, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="corpus"):
        write_corpus(tmp_path / "corpus")
    assert contents(tmp_path / "corpus") == {Path("mine.txt"): b"mine"}


def test_interpreter_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "none")}.__getitem__)
    with pytest.raises(UserError, match=r"no sources.*data\.files"):
        write_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_this_interpreter_has_text_enough_for_a_small_model(tmp_path):
    write_corpus(tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    assert len(sizes) == 9
    assert sum(sizes) > 8_000_000
    assert manifest["files"]["val.jsonl.zst"]["bytes"] > 100_000


def test_compressed_size_of_noise_and_of_repetition():
    noise = random.Random(0).randbytes(50_000)
    for bits in compressed_bits_per_byte(noise).values():
        assert 8 <= bits < 8.1
    repeated = compressed_bits_per_byte(noise * 4)
    assert set(repeated) == {"zstd -19", "xz -9"}
    assert all(2 <= bits < 2.1 for bits in repeated.values())
    assert repeated["xz -9"] == 8 * len(lzma.compress(noise * 4, preset=9)) / 200_000
    with pytest.raises(ValueError, match="empty"):
        compressed_bits_per_byte(b"")
