"""Micro-batches: what a rank computes of a step, its domains, masks, digests and the fingerprint of its order."""

import dataclasses
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.blocks import LaneReader, Part
from lamda.data.corpus import fingerprint, open_corpus, packing_of, require_a_batch
from lamda.data.lanes import Cursor
from lamda.data.loader import Loader, row_digest, separated
from tests.conftest import make_text, write_shard
from tests.data.ranks import read

BATCH = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for file in range(3):
        write_shard(folder / f"{file}.jsonl.zst", [make_text(100 * file + n, (37 * n * n) % 300) for n in range(21)])
    return Config.model_validate(
        {
            "run": {"seed": 5},
            "data": {"corpus": "standard_library", "files": f"{folder}/*", "sequence_length": 12},
            "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": 1},
        }
    )


@pytest.fixture(scope="module")
def corpus(config):
    with patch("lamda.data.partitioning.MIN_ROWS_PER_LANE", 20):
        corpus = open_corpus(config.data)
    assert len(corpus.lanes) > 4
    return corpus


def micro_batches(config, corpus, tokenizer, *, count=1, rank=0, world_size=1, micro_batch=3, **more):
    with Loader(
        corpus, tokenizer, packing=packing_of(config), seed=5, batch=BATCH, micro_batch=micro_batch, rank=rank,
        world_size=world_size, **more,
    ) as loader:  # fmt: skip
        return [each for step in islice(loader, count) for each in step.micro_batches]


def test_micro_batches_hold_the_same_rows_on_any_number_of_ranks(config, corpus, tokenizer):
    with patch("lamda.data.windows.FIRST_TOKENS", 2000):
        order = read(config, corpus, tokenizer, count=1).order

    def rows(world):
        found = [
            micro_batches(config, corpus, tokenizer, rank=rank, world_size=world, order=order) for rank in range(world)
        ]
        return [each.ids.tobytes() for rank in found for each in rank]

    assert rows(1) == rows(2) == rows(4)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_under_a_document_mask_the_end_symbol_begins_the_next_document(config, corpus, tokenizer, method):
    """Every pair of neighbours is judged by the documents that they come from, token by token."""
    packing = dataclasses.replace(packing_of(config), method=method)
    end, kinds = tokenizer.end_of_document, set()
    for lane in corpus.lanes:
        block = LaneReader(lane, tokenizer, packing).read(Part(0, Cursor(), None)).block
        origin = [[None] * (packing.sequence_length + 1) for _ in block.ids]
        for span in block.spans[block.spans["document"] >= 0]:
            for place in range(span["length"]):
                line = block.documents[span["document"]][2:4]
                origin[span["row"]][span["start"] + place] = (line, span["token"] + place)
        for row in range(len(block.ids)):
            documents, is_inside = separated(block, row, packing=packing, end_of_document=end)
            for place, (one, other) in enumerate(pairwise(origin[row])):
                is_next = one is not None and other is not None and one[0] == other[0]
                opens = not is_next and block.ids[row, place] == end and other is not None and other[1] == 0
                kinds.add((is_next, opens))
                if other is not None:
                    assert is_inside[place] == (is_next or opens)
                    another = _opens_another(origin[row], block.ids[row], place + 1, end)
                    assert (documents[place] == documents[place + 1]) == ((is_next or opens) and not another)
    assert {(True, False), (False, True)} <= kinds


def _opens_another(origin, ids, place, end):
    """Whether the token at `place` is EOS before a document's first one."""
    if place + 1 == len(origin) or ids[place] != end or origin[place + 1] is None:
        return False
    return (origin[place] is None or origin[place + 1][0] != origin[place][0]) and origin[place + 1][1] == 0


def test_a_document_mask_changes_no_token_and_leaves_every_target_of_the_usual_packing(config, corpus, tokenizer):
    made = (micro_batches(config, corpus, tokenizer, count=60, document_mask=mask) for mask in (True, False))
    ends = 0
    for masked, plain in zip(*made, strict=True):
        assert np.array_equal(masked.ids, plain.ids)
        assert plain.documents is None
        assert np.array_equal(masked.loss_mask, plain.loss_mask)
        inner = plain.loss_mask[:, 1:]  # whose input is no context, and whose target no padding
        opens = masked.ids[:, 1:-1] == tokenizer.end_of_document
        changes = masked.documents[:, 1:-1] != masked.documents[:, :-2]
        assert np.array_equal(changes[inner], opens[inner])
        ends += int(opens[inner].sum())
    assert ends > 5


def test_targets_carry_their_domain_and_unknown_ones_count_as_one(tmp_path, config, tokenizer):
    for number, domain in enumerate(["b", "a", "new"]):
        write_shard(tmp_path / f"{number}.jsonl", [make_text(n, 30 + 9 * number) for n in range(9)], domain=domain)
    with patch("lamda.data.partitioning.MIN_ROWS_PER_LANE", 15):
        corpus = open_corpus(config.data.model_copy(update={"files": (f"{tmp_path}/*",)}))
    assert len(corpus.lanes) > 2
    assert corpus.domains() == ["a", "b", "new"]
    run = read(config, corpus, tokenizer, domains=["a", "b"], until=lambda step: step.epochs["files"] >= 1)
    end = next(window.base + window.rows for _, window in run.windows if window.is_last)
    scored, domains = (np.concatenate(each)[:end] for each in (run.loss_mask, run.domains))
    texts = [[make_text(n, 30 + 9 * number) for n in range(9)] for number in range(3)]
    b, a, new = (sum(len(tokenizer.encode(text)) + 1 for text in each) for each in texts)
    assert np.bincount(domains[scored]).tolist() == [a, b, new]


def test_a_blocks_loss_mask_reaches_the_micro_batch(config, corpus, tokenizer, monkeypatch):
    made = LaneReader.read

    def masked(self, part):
        rows = made(self, part)
        return rows._replace(block=dataclasses.replace(rows.block, loss_mask=rows.block.ids % 3 == 0))

    monkeypatch.setattr(LaneReader, "read", masked)
    for part in micro_batches(config, corpus, tokenizer):
        assert np.array_equal(part.loss_mask, part.ids[:, 1:] % 3 == 0)


class ByteTokenizer:
    """UTF-8 bytes as ids, so that the golden order below depends on no library."""

    end_of_document, padding, vocab_size = 0, 1, 256

    def encode_documents(self, texts, *, threads):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def pieces(self, text):
        return [text]


GOLDEN = [
    ("concat", ("e3c43255566ce6c6", "c043359adf1f78a5")),
    ("best_fit", ("e3c43255566ce6c6", "22d7d2ce3c06d329")),
]


@pytest.mark.parametrize(("packing", "golden"), GOLDEN)
def test_the_order_of_a_fixed_corpus_never_changes(config, tmp_path, packing, golden):
    """Golden: may change together with `lamda.data.corpus.FORMAT` alone."""
    for file in range(3):
        write_shard(tmp_path / f"{file}.jsonl", [f"{file} {n} " * (n * n % 7) for n in range(1500)])
    data = config.data.model_copy(update={"files": (f"{tmp_path}/*",), "packing": packing, "shuffle": 2000})
    config = config.model_copy(update={"data": data})
    corpus = open_corpus(data)
    assert len(corpus.lanes) == 64
    with patch("lamda.data.windows.FIRST_TOKENS", 3000):
        run = read(config, corpus, ByteTokenizer(), count=120)
    assert run.order[0].windows[-1].number >= 3
    assert (run.digests[0], run.digests[-1]) == golden


def test_a_row_digest_is_of_little_endian_uint32():
    assert row_digest(np.array([1, 258], np.uint16)).tobytes() == sha256(b"\1\0\0\0\2\1\0\0").digest()


def test_the_fingerprint_names_what_the_order_depends_on(config, corpus, tokenizer):
    base = fingerprint(corpus, config, tokenizer)
    for key, value in {"shuffle": 3, "sequence_length": 13, "packing": "best_fit"}.items():
        changed = config.model_copy(update={"data": config.data.model_copy(update={key: value})})
        other = fingerprint(corpus, changed, tokenizer)
        assert {name for name in base if base[name] != other[name]} == {key}
    fewer = fingerprint(open_corpus(config.data), config, tokenizer)
    assert {name for name in base if base[name] != fewer[name]} == {"files"}
    batch = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 24})})
    assert fingerprint(corpus, batch, tokenizer) == base


def test_a_corpus_smaller_than_a_batch_is_refused(tmp_path: Path, tokenizer):
    write_shard(tmp_path / "0.jsonl", ["of the", "and to"])
    config = Config.model_validate(
        {
            "data": {"corpus": "standard_library", "files": str(tmp_path / "0.jsonl")},
            "train": {"steps": 1, "global_batch_size": 8},
        }
    )
    with pytest.raises(UserError, match=r"fewer than one batch of 8,200"):
        require_a_batch(open_corpus(config.data), config, tokenizer)
