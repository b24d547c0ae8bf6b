"""The benchmark of the data path measures what it says, and both of its ways read the same text."""

import json
import os
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from benchmarks import data, main
from benchmarks.data_stages import (
    ENCODER,
    USUAL,
    WHOLE,
    micro_batches,
    run_config,
    usual_dataset,
    usual_micro_batches,
)
from benchmarks.texts import books, short_documents, write_text
from tests.conftest import make_text, write_shard


def test_both_ways_give_the_same_rows(tmp_path, tokenizer, tokenizer_path, monkeypatch):
    monkeypatch.setattr("benchmarks.texts.SHARDS", 1)
    documents = [make_text(seed, 7 * seed) for seed in range(90)]
    text = write_text(tmp_path / "text", documents, tokenizer, tokens=10**9)
    config = run_config(text.shards, sequence_length=13, shuffle="none")
    processor = SentencePieceProcessor(model_file=str(tokenizer_path))
    usual = np.concatenate(
        list(usual_micro_batches(usual_dataset(config), processor, config, end=tokenizer.end_of_document))
    ).reshape(-1)
    assert 0 <= text.tokens - usual.size < 8 * 14
    batches = usual.size // (8 * 13)
    assert batches > 40
    with closing(micro_batches(config, tokenizer)) as ours:
        rows = np.concatenate(list(islice(ours, batches)))
    # Our rows share a token with the one before: what each adds is the same stream.
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), usual[: batches * 8 * 13])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_texts_are_cut_and_bound_without_loss():
    texts = [make_text(seed, 2000) for seed in range(5)]
    assert "".join(short_documents(texts)) == "".join(books(texts)) == "".join(texts)
    assert len(list(short_documents(texts))) > len(texts)


def test_the_report_has_rates_ratios_and_memory(tmp_path, tokenizer_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "ROUNDS", 2)
    write_shard(tmp_path / "text.jsonl.zst", [make_text(seed, 300) for seed in range(40)])
    allowed = os.sched_getaffinity(0)
    words = ["data", "--files", f"{tmp_path}/text.jsonl.zst", "--tokenizer", str(tokenizer_path)]
    words += ["--tokens", "9000", "--documents", "2000", "--json", str(tmp_path / "out" / "data.json")]
    assert main(words) == 0
    assert os.sched_getaffinity(0) == allowed
    report = json.loads((tmp_path / "out" / "data.json").read_text())
    assert {"command", "commit", "cpu", "cores", "versions", "texts", "memory"} == set(report)
    (text,) = report["texts"].values()
    assert 9000 <= text["tokens"] < 9000 + text["tokens"] / text["documents"] * 3
    assert list(text["stages"]) == ["decompress", "split lines", "parse JSON", ENCODER, "pack", WHOLE, USUAL]
    for stage in text["stages"].values():
        assert stage["megabytes_per_second"] == pytest.approx(
            stage["tokens_per_second"] * text["bytes"] / text["tokens"] / 1e6
        )
    rounds = [text["stages"][name]["rounds"] for name in (WHOLE, ENCODER)]
    expected = [whole / encoder for whole, encoder in zip(*rounds, strict=True)]
    assert text["ratios"][f"{WHOLE} / {ENCODER}"]["rounds"] == pytest.approx(expected)
    assert len(report["memory"]["megabytes_at_quarters"]) == 4
    printed = capsys.readouterr().out
    assert main(["data", "--markdown", "--json", str(tmp_path / "out" / "data.json")]) == 0
    assert capsys.readouterr().out == printed


def test_an_unknown_name_is_reported(capsys):
    assert main(["nothing"]) == 2
    assert "data" in capsys.readouterr().err


def test_too_little_text_is_reported(tmp_path, tokenizer_path, capsys):
    write_shard(tmp_path / "text.jsonl.zst", ["of the", "and to"])
    words = ["data", "--files", f"{tmp_path}/text.jsonl.zst", "--tokenizer", str(tokenizer_path), "--documents", "900"]
    assert main(words) == 2
    assert "fewer than a micro-batch of 8,200" in capsys.readouterr().err
