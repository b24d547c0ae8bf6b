"""Held-out figures are those of a plain sum over the text, however it is dealt."""

from math import log

import numpy as np
import pytest
import torch

from lamda.data.card import Source
from lamda.data.held_out import HeldOut
from lamda.training.evaluation import Scores, evaluate, held_out_bytes, table
from tests.conftest import make_text, write_shard

LENGTH = 17
TEXTS = {"a": [make_text(1, 50), "", "käse ⟫ 山"], "b": ["of\n", make_text(3, 120)], "c": [""]}
CPU = torch.device("cpu")


def cost(before, after, position):
    """Nats of a toy model that knows the token before, the target and its place in the row."""
    return (before * 7 + after * 3) % 11 / 5 + position / 100


def nats(inputs_BL, targets_BL, documents_BL=None):
    return cost(inputs_BL, targets_BL, torch.arange(inputs_BL.shape[1])).float()


@pytest.fixture
def held_out(tmp_path, tokenizer):
    for domain, texts in TEXTS.items():
        write_shard(tmp_path / f"{domain}.jsonl", texts, domain=domain)
    source = Source(name="s", license="none", files=f"{tmp_path}/*.jsonl", domain="meta.pile_set_name")
    return HeldOut((source,), tokenizer, LENGTH)


def by_hand(tokenizer, *, rows=None):
    """Domain -> (nats, targets, bytes) from a walk over the tokens of each file, which is of one domain."""
    sums = {domain: np.zeros(3) for domain in TEXTS}
    for domain, tokens in shown(tokenizer, rows).items():
        before = tokenizer.end_of_document
        for t, token in enumerate(tokens):
            sums[domain] += [cost(before, token, t % LENGTH), 1, tokenizer.token_bytes[token]]
            before = token
    return sums


def shown(tokenizer, rows):
    """Domain -> tokens of the first rows, which are each file's in turn."""
    tokens = {
        domain: [int(token) for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_document]]
        for domain, texts in TEXTS.items()
    }
    count = {domain: -(-len(own) // LENGTH) for domain, own in tokens.items()}
    turns = [domain for turn in range(max(count.values())) for domain in TEXTS if turn < count[domain]]
    taken = turns if rows is None else turns[:rows]
    return {domain: own[: taken.count(domain) * LENGTH] for domain, own in tokens.items()}


def as_sums(scores):
    columns = (scores.nats, scores.targets, scores.utf8_bytes)
    return {name: np.array([column[i] for column in columns]) for i, name in enumerate(scores.domains)}


def check(scores, expected):
    found = as_sums(scores)
    for domain, sums in expected.items():
        np.testing.assert_allclose(found.pop(domain, np.zeros(3)), sums, rtol=1e-6, err_msg=domain)
    assert not found


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 64])
def test_sums_are_those_of_a_walk_over_all_tokens(held_out, tokenizer, micro_batch):
    check(evaluate(held_out, nats, device=CPU, micro_batch=micro_batch), by_hand(tokenizer))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_bound_takes_the_first_rows(held_out, tokenizer, rows):
    scores = evaluate(held_out, nats, device=CPU, micro_batch=2, rows=rows)
    check(scores, by_hand(tokenizer, rows=rows))
    assert 0 < scores.targets.sum() <= rows * LENGTH


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("world", [2, 3, 40])
def test_ranks_together_find_what_one_finds_in_equally_many_calls(held_out, tokenizer, world, rows):
    calls = []

    def counted(inputs_BL, targets_BL, documents_BL):
        assert inputs_BL.shape == targets_BL.shape == (2, LENGTH)
        calls[-1] += 1
        return nats(inputs_BL, targets_BL)

    parts = []

    def on_rank(rank, total):
        calls.append(0)
        shared = {"device": CPU, "micro_batch": 2, "rank": rank, "world_size": world, "rows": rows}
        return evaluate(held_out, counted, total=total, **shared)

    for rank in range(world):
        on_rank(rank, lambda sums: parts.append(sums) or sums)
    assert len(set(calls)) == 1
    assert calls[0] > 0
    for rank in (0, world - 1):
        check(on_rank(rank, lambda sums: np.sum(parts, axis=0)), by_hand(tokenizer, rows=rows))


def test_bits_per_byte_are_all_nats_over_ln_2_and_the_utf8_bytes(held_out, tokenizer):
    scores = evaluate(held_out, nats, device=CPU, micro_batch=4)
    sums = by_hand(tokenizer)
    total = sum(sums.values())
    utf8_bytes = {domain: sum(len(text.encode()) for text in texts) for domain, texts in TEXTS.items()}
    report = scores.report()
    assert (report["bytes"], report["tokens"]) == (sum(utf8_bytes.values()), total[1])
    assert report["loss"] == pytest.approx(total[0] / total[1])
    assert report["perplexity"] == pytest.approx(np.e ** (total[0] / total[1]))
    assert report["bits_per_byte"] == pytest.approx(total[0] / log(2) / sum(utf8_bytes.values()))
    assert scores.metrics() == {
        "eval/loss": report["loss"],
        "eval/bits_per_byte": report["bits_per_byte"],
        "eval/loss/a": pytest.approx(sums["a"][0] / sums["a"][1]),
        "eval/loss/b": pytest.approx(sums["b"][0] / sums["b"][1]),
        "eval/loss/c": pytest.approx(sums["c"][0] / sums["c"][1]),
    }
    assert report["domains"]["b"]["bits_per_byte"] == pytest.approx(sums["b"][0] / log(2) / utf8_bytes["b"])
    assert report["domains"]["c"]["tokens"] == 1, "the end of its empty document"


def scores_of(loss):
    return Scores(("only",), np.array([loss * 4]), np.array([4]), np.array([9]))


def test_one_domain_has_no_rows_of_its_own():
    assert set(scores_of(2.0).metrics()) == {"eval/loss", "eval/bits_per_byte"}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("loss", [800.0, float("inf"), float("nan")])
def test_a_diverged_model_still_gets_its_report(loss):
    report = scores_of(loss).report()
    assert report["perplexity"] == pytest.approx(loss * float("inf"), nan_ok=True)
    assert len(list(table(report))) == 3


@pytest.mark.filterwarnings("error")
def test_empty_documents_alone_have_no_bits_per_byte_and_no_warning(tmp_path, tokenizer):
    write_shard(tmp_path / "empty.jsonl", ["", ""])
    source = Source(name="s", license="none", files=f"{tmp_path}/*.jsonl")
    scores = evaluate(HeldOut((source,), tokenizer, LENGTH), nats, device=CPU, micro_batch=2)
    assert np.isnan(scores.bits_per_byte())
    assert scores.loss() > 0
    assert len(list(table(scores.report()))) == 3


def test_held_out_bytes_are_the_text_or_none_where_it_is_long(held_out):
    text = "".join(text for texts in TEXTS.values() for text in texts).encode()
    assert held_out_bytes(held_out, limit=len(text)) == text
    assert held_out_bytes(held_out, limit=len(text) - 1) is None
