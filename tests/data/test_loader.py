"""The same samples on any number of ranks, with any threads, after any stop."""

import dataclasses
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.blocks import read_blocks
from lamda.data.corpus import fingerprint, open_corpus, packing_of, require_a_batch
from lamda.data.lanes import Cursor
from lamda.data.loader import Loader, batch_digest, merge_cursors, row_digest, separated
from tests.conftest import make_text, write_shard

BATCH, MICRO = 12, 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for file in range(3):
        write_shard(folder / f"{file}.jsonl.zst", [make_text(100 * file + n, (37 * n * n) % 300) for n in range(21)])
    return Config.model_validate(
        {
            "run": {"seed": 5},
            "data": {
                "corpus": "standard_library",
                "files": f"{folder}/*",
                "sequence_length": 13,
                "block_rows": 5,
                "lanes": 7,
            },
            "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": MICRO},
        }
    )


@pytest.fixture(scope="module")
def corpus(config):
    return open_corpus(config.data)


def steps(config, corpus, tokenizer, *, world, count, consumed=0, cursors=None, skipped=(), threads=1):
    """Digests of `count` steps on `world` simulated ranks, all cursors after them, and what was consumed."""
    loaders = [
        Loader(
            corpus, tokenizer, packing=packing_of(config), batch=BATCH, micro_batch=MICRO, rank=rank, world=world,
            consumed=consumed, cursors=cursors, skipped=skipped, threads=threads,
        )
        for rank in range(world)
    ]  # fmt: skip
    found = []
    for parts in zip(*loaders, range(count), strict=False):
        rows = np.zeros((BATCH, 32), np.uint8)
        for part in parts[:-1]:
            rows[part.positions] += part.digests
            consumed = part.consumed
        found.append(batch_digest(rows))
    merged = merge_cursors(loader.cursors(consumed) for loader in loaders)
    for loader in loaders:
        loader.close()
    return found, merged, consumed


@pytest.fixture(scope="module")
def straight(config, corpus, tokenizer):
    return steps(config, corpus, tokenizer, world=1, count=30)[0]


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_any_number_of_ranks_sees_the_same_samples(config, corpus, tokenizer, straight, world):
    assert steps(config, corpus, tokenizer, world=world, count=30)[0] == straight


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(config, corpus, tokenizer, straight, threads):
    assert steps(config, corpus, tokenizer, world=2, count=12, threads=threads)[0] == straight[:12]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=4))
def test_stops_anywhere_and_resumes_on_other_ranks_lose_and_repeat_nothing(config, corpus, tokenizer, straight, parts):
    found, cursors, consumed = [], None, 0
    for count, world in parts:
        more, cursors, consumed = steps(
            config, corpus, tokenizer, world=world, count=count, consumed=consumed, cursors=cursors
        )
        found += more
    assert found[: len(straight)] == straight[: len(found)]


def test_cursors_only_save_time(config, corpus, tokenizer, straight):
    _, cursors, consumed = steps(config, corpus, tokenizer, world=2, count=20)
    assert any(cursor.block for cursor in cursors.values())
    without = steps(config, corpus, tokenizer, world=1, count=5, consumed=consumed)[0]
    assert without == straight[20:25]


def test_skipped_windows_are_jumped_on_every_number_of_ranks(config, corpus, tokenizer, straight):
    skipped = [(BATCH * 3, BATCH * 5)]
    expected = straight[:3] + straight[5:8]
    for world in (1, 3):
        assert steps(config, corpus, tokenizer, world=world, count=6, skipped=skipped)[0] == expected


def test_micro_batches_hold_the_same_rows_on_any_number_of_ranks(config, corpus, tokenizer):
    def micro_batches(world):
        loaders = [
            Loader(corpus, tokenizer, packing=packing_of(config), batch=BATCH, micro_batch=3, rank=rank, world=world)
            for rank in range(world)
        ]
        rows = [part.ids.tobytes() for loader in loaders for part in next(iter(loader)).micro_batches]
        for loader in loaders:
            loader.close()
        return rows

    assert micro_batches(1) == micro_batches(2) == micro_batches(4)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_under_a_document_mask_the_end_symbol_begins_the_next_document(config, corpus, tokenizer, method):
    """Every pair of neighbours is told from the documents that they come from, token by token."""
    packing = dataclasses.replace(packing_of(config), method=method)
    end, kinds = tokenizer.end_of_document, set()
    for lane in corpus.lanes:
        blocks = read_blocks(lane, Cursor(), packing=packing, tokenizer=tokenizer)
        for block in (next(blocks)[0], next(blocks)[0]):
            origin = [[None] * packing.row_length for _ in range(packing.rows)]
            for run in block.runs:
                for place in range(run["length"]):
                    origin[run["row"]][run["start"] + place] = (run["document"], run["token"] + place)
            for row in range(packing.rows):
                documents, is_inside = separated(block, row, packing=packing, end_of_document=end)
                for place, (one, other) in enumerate(pairwise(origin[row])):
                    is_next = one[0] == other[0]
                    opens = not is_next and block.ids[row, place] == end and other[1] == 0
                    assert is_inside[place] == (is_next or opens)
                    assert (documents[place] == documents[place + 1]) == (
                        opens or (is_next and not _opens_another(origin[row], block.ids[row], place + 1, end))
                    )
                    kinds.add((is_next, opens))
    assert {(True, False), (False, True)} <= kinds


def _opens_another(origin, ids, place, end):
    """Whether the token at `place` is the end symbol before a document's first one."""
    if place + 1 == len(origin) or ids[place] != end:
        return False
    return origin[place + 1][0] != origin[place][0] and origin[place + 1][1] == 0


def test_a_document_mask_changes_no_token_and_leaves_every_target_of_the_usual_packing(config, corpus, tokenizer):
    packing = packing_of(config)

    def first(**more):
        with Loader(corpus, tokenizer, packing=packing, batch=BATCH, micro_batch=3, rank=0, world=1, **more) as loader:
            return next(iter(loader)).micro_batches

    for masked, plain in zip(first(document_mask=True), first(), strict=True):
        assert np.array_equal(masked.ids, plain.ids)
        assert plain.documents is None
        assert plain.scored.all()
        assert masked.scored.all()
        ends = masked.ids[:, 1:-1] == tokenizer.end_of_document
        assert np.array_equal(masked.documents[:, 1:-1] != masked.documents[:, :-2], ends)


def test_targets_carry_their_domain_and_unknown_ones_count_as_one(tmp_path, config, tokenizer):
    for number, domain in enumerate(["b", "a", "new"]):
        write_shard(tmp_path / f"{number}.jsonl", [make_text(n, 30) for n in range(9)], domain=domain)
    corpus = open_corpus(config.data.model_copy(update={"files": (f"{tmp_path}/*",), "lanes": 3}))
    assert corpus.domains() == ["a", "b", "new"]
    packing = packing_of(config)
    with Loader(
        corpus, tokenizer, packing=packing, batch=BATCH, micro_batch=4, rank=0, world=1, domains=["a", "b"]
    ) as loader:
        parts = next(iter(loader)).micro_batches
    for part, domain in zip(parts, [1, 0, 2], strict=True):  # rows come sorted by lane
        assert (part.domains == domain).all()


def test_a_blocks_loss_mask_reaches_the_micro_batch(config, corpus, tokenizer, monkeypatch):
    def masked(*arguments, **more):
        for block, cursor in read_blocks(*arguments, **more):
            yield dataclasses.replace(block, loss_mask=block.ids % 3 == 0), cursor

    monkeypatch.setattr("lamda.data.loader.read_blocks", masked)
    with Loader(corpus, tokenizer, packing=packing_of(config), batch=BATCH, micro_batch=3, rank=0, world=1) as loader:
        for part in next(iter(loader)).micro_batches:
            assert np.array_equal(part.scored, part.ids[:, 1:] % 3 == 0)


class ByteTokenizer:
    """UTF-8 bytes as ids, so that the golden order below depends on no library."""

    end_of_document = 0

    def encode_documents(self, texts, *, threads):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


def test_the_order_of_a_fixed_corpus_never_changes(config, tmp_path):
    """Golden: may change together with `lamda.data.corpus.FORMAT` alone."""
    for file in range(3):
        write_shard(tmp_path / f"{file}.jsonl", [f"{file} {n} " * (n * n % 50) for n in range(30)])
    data = config.data.model_copy(update={"files": (f"{tmp_path}/*",)})
    found = steps(config, open_corpus(data), ByteTokenizer(), world=1, count=40)[0]
    assert (found[0], found[39]) == ("70ed3e500f8a12b5", "f6ef8214eef0eb47")


def test_a_row_digest_is_of_little_endian_uint32():
    assert row_digest(np.array([1, 258], np.uint16)).tobytes() == sha256(b"\1\0\0\0\2\1\0\0").digest()


def test_the_fingerprint_names_what_the_order_depends_on(config, corpus, tokenizer):
    base = fingerprint(corpus, config, tokenizer)
    changed = config.model_copy(update={"data": config.data.model_copy(update={"lanes": 3})})
    other = fingerprint(open_corpus(changed.data), changed, tokenizer)
    assert {key for key in base if base[key] != other[key]} == {"lanes", "files"}
    batch = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 24})})
    assert fingerprint(corpus, batch, tokenizer) == base


def test_a_corpus_smaller_than_a_batch_is_refused(tmp_path: Path, tokenizer):
    write_shard(tmp_path / "0.jsonl", ["of the", "and to"])
    config = Config.model_validate(
        {
            "data": {"corpus": "standard_library", "files": str(tmp_path / "0.jsonl"), "lanes": 2},
            "train": {"steps": 1, "global_batch_size": 8},
        }
    )
    with pytest.raises(UserError, match=r"fewer than one batch of 8,200"):
        require_a_batch(open_corpus(config.data), config, tokenizer)
