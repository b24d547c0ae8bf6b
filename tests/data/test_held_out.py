"""Held-out text is read once, in order; every token but a document's first is scored once."""

import itertools

import numpy as np
import pytest

from lamda.data.card import Source
from lamda.data.held_out import HeldOut, micro_batches
from tests.conftest import make_text, write_shard

TEXTS = [make_text(1, 50), "", make_text(2, 3), "of\n", make_text(3, 120)]


@pytest.fixture
def held_out(tmp_path, tokenizer):
    write_shard(tmp_path / "0.jsonl", TEXTS[:2], domain="a")
    write_shard(tmp_path / "1.jsonl", TEXTS[2:], domain="b")
    source = Source(name="s", licence="none", files=f"{tmp_path}/*.jsonl", domain="meta.pile_set_name")
    return HeldOut((source,), tokenizer, 17)


def test_every_token_but_a_documents_first_is_scored_once_in_order(held_out, tokenizer):
    domains: list[str] = []
    rows = list(held_out.rows(domains))
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in TEXTS]
    scored = [int(token) for row in rows for token in row.ids[1:][row.scored]]
    assert scored == [token for document in documents for token in document[1:]]
    assert domains == ["a", "b"]
    by_domain = np.concatenate([row.domains[row.scored] for row in rows])
    assert by_domain.tolist() == [int(n >= 2) for n, document in enumerate(documents) for _ in document[1:]]


def test_rows_overlap_by_one_token_and_the_last_is_padded(held_out, tokenizer):
    rows = list(held_out.rows([]))
    for row, following in itertools.pairwise(rows):
        assert row.ids[-1] == following.ids[0]
    assert all(len(row.ids) == 18 for row in rows)
    assert rows[-1].ids[-1] == tokenizer.padding
    assert not rows[-1].scored[-1]


def test_bytes_of_all_rows_are_the_utf8_bytes_of_the_documents(held_out):
    domains: list[str] = []
    total = np.zeros(2, np.int64)
    for row in held_out.rows(domains):
        total[: len(row.utf8_bytes)] += row.utf8_bytes
    assert total.tolist() == [sum(len(t.encode()) for t in TEXTS[:2]), sum(len(t.encode()) for t in TEXTS[2:])]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_every_row_once_and_as_many_micro_batches(held_out, world):
    rows = list(held_out.rows([]))
    parts = [list(micro_batches(iter(rows), size=2, rank=rank, world=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = [row for part in parts for batch in part for row in batch]
    assert sorted(map(id, seen)) == sorted(map(id, rows))
