"""Text in S3 and in other stores of fsspec is found and read like text on the disk."""

import json

import fsspec
import pytest

from lamda.config.errors import UserError
from lamda.data.card import Source
from lamda.data.files import read_lines
from lamda.data.resolving import resolve
from tests.conftest import make_text, write_shard
from tests.s3 import s3_bucket

TEXTS = [make_text(seed, 60) for seed in range(6)]


@pytest.fixture(params=["s3", "memory"])
def store(request):
    if request.param == "memory":
        yield "memory://texts"
        fsspec.filesystem("memory").rm("/texts", recursive=True)
    else:
        with s3_bucket() as address:
            yield address


def texts_of(files):
    return [json.loads(line.data)["text"] for file in files for line in read_lines(file)]


def test_a_pattern_of_a_store_reads_what_its_files_hold(store, tmp_path):
    fs, _ = fsspec.url_to_fs(store)
    for name, texts in {"a.jsonl.zst": TEXTS[:4], "b.jsonl": TEXTS[4:]}.items():
        write_shard(tmp_path / name, texts)
        fs.pipe_file(f"{store}/{name}", (tmp_path / name).read_bytes())
    files = resolve(Source(name="s", license="none", files=(f"{store}/*",)))
    assert [file.url.rpartition("/")[2] for file in files] == ["a.jsonl.zst", "b.jsonl"]
    assert texts_of(files) == TEXTS


def test_a_pattern_that_matches_nothing_in_a_store_is_named(store):
    fs, _ = fsspec.url_to_fs(store)
    fs.pipe_file(f"{store}/a.jsonl", b"")
    with pytest.raises(UserError, match=r"none\*"):
        resolve(Source(name="s", license="none", files=(f"{store}/none*",)))
