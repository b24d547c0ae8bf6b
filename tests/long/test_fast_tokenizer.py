"""The fast tokenizer gives SentencePiece's ids, and its text back, on a million lines of real and hostile text.

`python -m pytest -s tests/long/test_fast_tokenizer.py` says how many lines of which kind. Needs LAMDA_TEST_DATA.
"""

import io
import json
import os
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from lamda.data.tokenizer_training import train_tokenizer
from tests.interop.hostile import all_scalars, hostile_lines
from tests.interop.test_tokenization import Pair

DATA = os.environ.get("LAMDA_TEST_DATA")
LINES = 1_000_000
TOGETHER = 20_000
pytestmark = pytest.mark.skipif(DATA is None, reason="LAMDA_TEST_DATA is not set")


def real_documents():
    """The texts of the sample of The Pile, and of the declaration of human rights in many languages."""
    files = [*sorted(Path(DATA, "pile-sample").rglob("*.jsonl.zst")), Path(DATA, "udhr.jsonl.zst")]
    for file in files:
        with file.open("rb") as stream:
            for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(stream), "utf-8"):
                yield json.loads(line)["text"]


def test_a_million_lines_have_sentencepieces_ids(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(islice(real_documents(), 1000), path, vocab_size=8000)
    pair = Pair(path)
    real = islice((line for text in real_documents() for line in text.splitlines(keepends=True)), LINES // 2)
    counts = {"real": 0, "scalars": 0, "hostile": 0}
    for kind, lines in {"real": real, "scalars": all_scalars(), "hostile": hostile_lines(pair.pieces, seed=1)}.items():
        wanted = LINES - sum(counts.values()) if kind == "hostile" else None
        limited = islice(lines, wanted)
        while batch := [*islice(limited, TOGETHER)]:
            pair.check(batch)
            counts[kind] += len(batch)
    print(f"\n{pair.vocab_size} pieces; lines alike: {counts}; {sum(counts.values()):,} in all")
    assert sum(counts.values()) >= LINES
