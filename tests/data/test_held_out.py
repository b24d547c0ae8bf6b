"""Held-out text is read once, in order; every token is scored once, a document's first after EOS."""

import itertools
from dataclasses import replace

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
    source = Source(name="s", license="none", files=f"{tmp_path}/*.jsonl", domain="meta.pile_set_name")
    return HeldOut((source,), tokenizer, 17)


FILES = [TEXTS[:2], TEXTS[2:]]


def by_file(rows, domains=("a", "b")):
    """The rows of each file, whose texts are of one domain each."""
    return [
        [row for row in rows if row.domains[row.loss_mask].size and row.domains[0] == n] for n in range(len(domains))
    ]


def test_every_token_is_scored_once_in_the_order_of_its_file(held_out, tokenizer):
    domains: list[str] = []
    rows = list(held_out.rows(domains))
    assert domains == ["a", "b"]
    for number, (texts, own) in enumerate(zip(FILES, by_file(rows), strict=True)):
        documents = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in texts]
        scored = [int(token) for row in own for token in row.ids[1:][row.loss_mask]]
        assert scored == [token for document in documents for token in document]
        assert {n for row in own for n in row.domains[row.loss_mask].tolist()} == {number}


def test_rows_come_from_all_files_in_turn(held_out):
    rows = [row.domains[0] for row in held_out.rows([])]
    shorter = min(rows.count(0), rows.count(1))
    assert shorter > 1
    assert rows[: 2 * shorter] == [0, 1] * shorter


def test_many_files_are_shared_out_and_read_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("lamda.data.held_out.MAX_OPEN_FILES", 3)
    for number in range(8):
        write_shard(tmp_path / f"{number}.jsonl", [make_text(number, 60)], domain=str(number))
    source = Source(name="s", license="none", files=f"{tmp_path}/*.jsonl", domain="meta.pile_set_name")
    domains: list[str] = []
    rows = list(HeldOut((source,), tokenizer, 17).rows(domains))
    assert domains[:3] == ["0", "1", "2"]
    assert sorted(domains) == sorted(map(str, range(8)))
    scored = sum(int(row.loss_mask.sum()) for row in rows)
    assert scored == sum(len(tokenizer.encode(make_text(number, 60))) + 1 for number in range(8))


def test_rows_of_a_file_overlap_by_one_token_and_its_last_is_padded(held_out, tokenizer):
    for rows in by_file(list(held_out.rows([]))):
        assert rows[0].ids[0] == tokenizer.end_of_document
        for row, following in itertools.pairwise(rows):
            assert row.ids[-1] == following.ids[0]
        assert all(len(row.ids) == 18 for row in rows)
        assert rows[-1].ids[-1] == tokenizer.padding
        assert not rows[-1].loss_mask[-1]


def test_under_a_document_mask_an_input_is_of_its_targets_document(held_out, tokenizer):
    plain = list(held_out.rows([]))
    masked = list(replace(held_out, document_mask=True).rows([]))
    for row, other in zip(masked, plain, strict=True):
        assert np.array_equal(row.ids, other.ids)
        assert np.array_equal(row.loss_mask, other.loss_mask)
        ends = row.ids[1:-1] == tokenizer.end_of_document
        changes = row.documents[1:] != row.documents[:-1]
        assert np.array_equal(changes, ends), "EOS is the first input of the next document, or of padding"
    assert all(row.documents is None for row in plain)


def test_bytes_of_all_rows_are_the_utf8_bytes_of_the_documents(held_out):
    domains: list[str] = []
    total = np.zeros(2, np.int64)
    for row in held_out.rows(domains):
        total[: len(row.utf8_bytes)] += row.utf8_bytes
    assert total.tolist() == [sum(len(t.encode()) for t in TEXTS[:2]), sum(len(t.encode()) for t in TEXTS[2:])]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_every_row_once_and_as_many_micro_batches(held_out, world):
    rows = list(held_out.rows([]))
    parts = [list(micro_batches(iter(rows), size=2, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = [row for part in parts for batch in part for row in batch]
    assert sorted(map(id, seen)) == sorted(map(id, rows))
