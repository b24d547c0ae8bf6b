"""The benchmark of the order counts what the loader gives, and separates a good order from a bad one."""

import json

import numpy as np
import pytest

from benchmarks import main, order
from benchmarks.order_corpora import Case, Labelled, pile_documents
from tests.conftest import make_text, write_shard


@pytest.fixture
def small(monkeypatch):
    """A small file that is sorted by its domain."""
    monkeypatch.setattr(order, "VOCABULARY", 440)
    monkeypatch.setattr("lamda.data.windows.FIRST_TOKENS", 4000)
    documents = [Labelled(f"{number} {make_text(number, 60)}", f"{number // 50}") for number in range(200)]
    return Case("small", {"all/0.jsonl": documents}, "domain", length=16)


def test_each_token_is_counted_and_a_sorted_file_is_mixed(tmp_path, small):
    found = order.measure(tmp_path / "mixed", small)
    assert (found["never_seen"], found["seen_most_often"]) == (0, 1)
    assert found["rows"] * 16 - found["lanes"] * 16 < found["tokens"] <= found["rows"] * 16
    assert found["windows"] > 2
    for when in ("mean", "first_tenth"):
        assert found["distance"][when] < 1.2 * found["random_distance"][when]


def test_the_order_of_the_file_is_seen_to_be_far_from_the_corpus(tmp_path, small):
    found = order.measure(tmp_path / "sorted", small, shuffle="none")
    assert (found["never_seen"], found["seen_most_often"]) == (0, 1)
    assert found["distance"]["mean"] > 0.6 > 3 * found["random_distance"]["mean"]


def test_the_distance_is_the_total_variation():
    sorted_rows = np.repeat(np.array([[5, 0], [0, 5]]), 2 * order.BATCH, axis=0)
    assert order._distances(sorted_rows[None]) == {"mean": 0.5, "first_tenth": 0.5}
    mixed = np.tile(np.array([[5, 0], [0, 5]]), (2 * order.BATCH, 1))
    assert order._distances(mixed[None]) == {"mean": 0, "first_tenth": 0}


def test_the_report_is_written_and_printed_again(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(order, "cases", lambda documents: [small])
    words = ["order", "--json", str(tmp_path / "out" / "order.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "order.json").read_text())
    assert {"command", "commit", "cpu", "cores", "versions", "sorted_text", "batch", "cases"} == set(report)
    assert main([*words, "--markdown"]) == 0
    assert capsys.readouterr().out == printed
    assert f"small ({report['cases']['small']['tokens']:,} tokens, L 16" in printed


def test_documents_are_sorted_by_domain_and_none_comes_twice(tmp_path):
    write_shard(tmp_path / "0.jsonl.zst", ["one", "two", "one"])
    assert sorted(document.text for document in pile_documents(f"{tmp_path}/*")) == ["one", "two"]
