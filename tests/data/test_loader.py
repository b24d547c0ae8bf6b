"""The same samples on any number of ranks, with any threads, after any stop; each token once an epoch."""

import dataclasses
import tempfile
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from lamda.config.errors import DataError
from lamda.data.corpus import open_corpus
from lamda.data.documents import Encoded, RawText
from lamda.data.lanes import RAW_TEXT
from lamda.data.row_cache import RowCache
from tests.data.ranks import BAD, BLANK, SINGLE, SUFFIXES, Numbers, Run, config_of, read, write_file

BATCH = 12
LENGTHS = st.one_of(st.just(0), st.integers(1, 6), st.integers(7, 60), st.just(300))
LINES = st.lists(st.one_of(LENGTHS, LENGTHS, st.sampled_from([BAD, BLANK])), min_size=1, max_size=10)
FILES = st.lists(st.tuples(st.sampled_from(SUFFIXES), LENGTHS, LINES), min_size=1, max_size=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A corpus of numbers: of each source its files, and how small lanes and windows are made for it."""

    sources: tuple[tuple[tuple[str, tuple[int | str, ...]], ...], ...]
    weights: tuple[float, ...] = (1.0,)
    length: int = 8
    shuffle: int | str = 40
    packing: str = "concat"
    first_tokens: int = 200
    least_rows: int = 1
    cut_compressed: int = 1 << 20
    most: int = 12


@st.composite
def cases(draw, **fixed):
    drawn = draw(st.lists(FILES, min_size=1, max_size=3))
    sources = tuple(
        tuple((suffix, (first, *(() if suffix in SINGLE else lines))) for suffix, first, lines in files)
        for files in drawn
    )
    values = {
        "weights": tuple(draw(st.sampled_from([1.0, 2.0, 0.3])) for _ in sources),
        "length": draw(st.sampled_from([3, 8, 21])),
        "shuffle": draw(st.sampled_from([2, 40, 16384, "none", "epoch"])),
        "packing": draw(st.sampled_from(["concat", "best_fit"])),
        "first_tokens": draw(st.sampled_from([16, 200, 3000])),
        "least_rows": draw(st.sampled_from([1, 4])),
        "cut_compressed": draw(st.sampled_from([0, 1 << 20])),
        "most": draw(st.sampled_from([1, 5, 20])),
    }
    return Case(sources, **{**values, **fixed})


@contextmanager
def opened(case, *, form=RAW_TEXT):
    """The configuration and corpus of a case, and of each source the ids of its documents in the files' order."""
    with (
        tempfile.TemporaryDirectory() as place,
        patch("lamda.data.order.SLOTS", 256),
        patch("lamda.data.windows.SLOTS", 256),
        patch("lamda.data.windows.FIRST_TOKENS", case.first_tokens),
        patch("lamda.data.corpus.MAX_LANES", case.most),
        patch("lamda.data.partitioning.MIN_ROWS_PER_LANE", case.least_rows),
        patch("lamda.data.partitioning.CUT_COMPRESSED", (case.cut_compressed, 1 << 24)),
    ):
        folder, last, texts = Path(place), 1, []
        for number, files in enumerate(case.sources):
            (folder / str(number)).mkdir()
            texts.append([])
            for name, (suffix, lines) in enumerate(files):
                content = []
                for line in lines:
                    length = 0 if isinstance(line, str) else line
                    content.append(line if isinstance(line, str) else list(range(last + 1, last + 1 + length)))
                    last += length
                write_file(folder / str(number) / f"{name}{suffix}", content)
                texts[-1] += [[*line, 0] for line in content if not isinstance(line, str)]
        config = config_of(
            folder, case.weights, sequence_length=case.length, shuffle=case.shuffle, packing=case.packing
        )
        yield config, open_corpus(config.data, form=form), texts


def rows_of_epochs(run: Run, corpus, source: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The ids and scored targets of each epoch of a source that the run has read to its end, in order."""
    sources, _ = corpus.mixture.rows(np.arange(run.consumed))
    ids, scored = (np.concatenate(each)[sources == source] for each in (run.ids, run.loss_mask))
    begins = {window.epoch: window.epoch_base for of, window in run.windows if of == source}
    ends = {window.epoch: window.base + window.rows for of, window in run.windows if of == source and window.is_last}
    return {
        epoch: (ids[begins[epoch] : end], scored[begins[epoch] : end]) for epoch, end in ends.items() if end <= len(ids)
    }


def two_epochs(step):
    """Whether each source has been read twice, or the run is long enough: a small weight takes long."""
    return min(step.epochs.values()) >= 2 or max(step.epochs.values()) >= 20 or step.consumed >= 1500


BOOK = ((".jsonl", (3, 0, 900, BAD, 4)),)
SMALL = tuple((".jsonl", (length, 5)) for length in range(12))


@settings(max_examples=25, deadline=None)
@example(Case((BOOK,), most=64))
@example(Case((BOOK,), packing="best_fit", first_tokens=16))
@example(Case((SMALL, BOOK), weights=(1, 1), length=3))
@example(Case((((".jsonl", (0,)),),)))
@given(cases())
def test_an_epoch_has_every_token_once_as_a_target_and_no_row_of_two_epochs(case):
    with opened(case) as (config, corpus, texts):
        run = read(config, corpus, Numbers(), until=two_epochs)
        event(f"{len(corpus.lanes).bit_length()} bits of lanes, {len(run.windows).bit_length()} of windows")
        for source, documents in enumerate(texts):
            epochs = rows_of_epochs(run, corpus, source)
            assert run.epochs[-1][str(source)] < 1 or 0 in epochs
            before = {one: other for document in documents for other, one in pairwise([0, *document]) if one}
            for ids, scored in epochs.values():
                targets = ids[:, 1:][scored]
                assert Counter(targets.tolist()) == Counter(id for document in documents for id in document)
                assert (ids[:, 1:][~scored] == Numbers.padding).all()
                assert len(ids) * case.length - len(targets) < case.length * len(corpus.sources[source])
                for row in ids[scored.any(axis=1)].tolist():
                    if row[1]:
                        assert row[0] == before[row[1]]
            if case.shuffle == "none" and case.packing == "concat":
                for ids, scored in epochs.values():
                    assert ids[:, 1:][scored].tolist() == [id for document in documents for id in document]


@settings(max_examples=10, deadline=None)
@example(Case((BOOK,), shuffle="none"), 3, 5, True)
@example(Case((SMALL, BOOK), weights=(1, 1), length=3), 4, 2, False)
@given(cases(), st.sampled_from([2, 3, 4]), st.sampled_from([1, 2, 5]), st.booleans())
def test_any_ranks_threads_and_kept_rows_give_the_same_samples(case, world, threads, keeps):
    with opened(case) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), until=lambda step: two_epochs(step) or step.consumed >= 600)
        count = len(straight.digests)
        for kept in ("made", "found") if keeps else ("nowhere",):
            row_cache = RowCache.of(config.data.cache_dir, {}) if keeps else None
            run = read(config, corpus, Numbers(), count=count, world_size=world, threads=threads, row_cache=row_cache)
            assert run.digests == straight.digests, kept
            assert (run.order, run.epochs) == (straight.order, straight.epochs)
            assert all(map(np.array_equal, run.loss_mask, straight.loss_mask))


@settings(max_examples=12, deadline=None)
@example(Case((BOOK,)), [(n, n % 4 + 1) for n in range(1, 9)])
@given(cases(), st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=5))
def test_stops_anywhere_and_resumes_on_other_ranks_lose_and_repeat_nothing(case, parts):
    with opened(case) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), count=sum(count for count, _ in parts) or 1)
        run, found = None, []
        for count, world in parts:
            run = read(config, corpus, Numbers(), count=count, world_size=world, after=run)
            found += run.digests
        assert found == straight.digests[: len(found)]
        if found:
            assert run.order == straight.order


def test_a_resume_without_the_windows_only_takes_longer():
    with opened(Case((BOOK, SMALL), weights=(1, 2))) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), count=20)
        run = read(config, corpus, Numbers(), count=12, world_size=2)
        assert any(window.number for order in run.order for window in order.windows)
        again = read(config, corpus, Numbers(), count=8, after=run, with_order=False)
        assert again.digests == straight.digests[12:]
        assert again.order == straight.order


def test_skipped_samples_are_jumped_on_every_number_of_ranks():
    with opened(Case((BOOK, SMALL), weights=(1, 2))) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), count=45).digests
        expected = straight[:3] + straight[5:9] + straight[40:]
        for world in (1, 3):
            skipped = [(BATCH * 3, BATCH * 5), (BATCH * 9, BATCH * 40)]
            assert read(config, corpus, Numbers(), count=12, world_size=world, skipped=skipped).digests == expected


def test_every_epoch_of_a_source_has_another_order():
    with opened(Case((SMALL,), shuffle=16384, first_tokens=1 << 18)) as (config, corpus, _):
        run = read(config, corpus, Numbers(), until=lambda step: step.epochs["0"] >= 3)
        orders = [[tuple(row) for row in ids.tolist()] for ids, _ in rows_of_epochs(run, corpus, 0).values()]
        assert len(orders) >= 3
        assert len({tuple(order) for order in orders}) == len(orders)
        assert len({tuple(sorted(order)) for order in orders}) == 1


def test_batches_of_sorted_text_are_of_all_of_it():
    """Eighths of a corpus in its order are in every batch, and without shuffling one at a time."""
    text = ((".jsonl", (30,) * 320),)
    for shuffle, fewest in ((16384, 6), ("none", 1)):
        with opened(Case((text,), shuffle=shuffle, first_tokens=4000, most=64)) as (config, corpus, _):
            run = read(config, corpus, Numbers(), until=lambda step: step.epochs["0"] >= 1)
            ids = np.stack([ids[:, 1:].max(axis=1) for ids in run.ids[:-1]]).astype(int)  # of each row
            eighths = [len(set(step)) for step in ((ids - 2) * 8 // (320 * 30)).tolist()]
            assert min(eighths) == fewest
            assert (max(eighths) <= 2) == (shuffle == "none")


def test_three_equal_sources_are_in_every_batch_of_eight():
    with opened(Case((SMALL,) * 3, weights=(1, 1, 1))) as (config, corpus, texts):
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 8})})
        run = read(config, corpus, Numbers(), count=20)
        for ids in run.ids:
            largest = ids.max(axis=1)
            assert {sum(row > max(text[-1]) for text in texts) for row in largest} == {0, 1, 2}


@pytest.mark.parametrize("kind", [BAD, BLANK])
def test_a_source_without_a_document_ends_the_run_by_name(kind):
    with opened(Case((SMALL, ((".jsonl", (kind, kind)),)), weights=(1, 1))) as (config, corpus, _):
        for world in (1, 2):
            with pytest.raises(DataError, match="source '1': none of its lines holds a document"):
                read(config, corpus, Numbers(), count=2, world_size=world)


@dataclasses.dataclass(frozen=True)
class Examples(RawText):
    """Documents as examples of up to four ids each, packed whole; every other id is a target."""

    packings: tuple[str, ...] = ("whole",)

    def pieces(self, document, tokenizer):
        return [document]

    def encode(self, documents, tokenizer):
        encoded = tokenizer.encode_documents([document.text for document in documents], threads=1)
        parts = [[ids[start : start + 4] for start in range(0, len(ids), 4)] for ids in encoded]
        return [[Encoded(ids, ids % 2 == 0) for ids in document] for document in parts]


@settings(max_examples=12, deadline=None)
@given(cases(packing="whole"), st.sampled_from([2, 3]))
def test_whole_packing_has_every_example_once_an_epoch_on_any_number_of_ranks(case, world):
    if not any(line for files in case.sources for _, lines in files for line in lines if not isinstance(line, str)):
        return
    with opened(case, form=Examples()) as (config, corpus, texts):
        if any(not any(document != [0] for document in documents) for documents in texts):
            with pytest.raises(DataError, match="none of its lines holds a document"):
                read(config, corpus, Numbers(), count=1)
            return
        run = read(config, corpus, Numbers(), until=two_epochs)
        assert read(config, corpus, Numbers(), count=len(run.digests), world_size=world).digests == run.digests
        for source, documents in enumerate(texts):
            examples = [
                tuple(document[start : min(start + 4, len(document) - 1)])
                for document in documents
                for start in range(0, len(document) - 1, 4)
            ]
            for ids, scored in rows_of_epochs(run, corpus, source).values():
                by_first = {each[0]: each for each in examples}
                found = [each for row in ids.tolist() for each in _examples_in(row, by_first)]
                assert Counter(found) == Counter(examples)
                targets = sorted(id for each in examples for id in each[1:] if id % 2 == 0)
                assert sorted(ids[:, 1:][scored].tolist()) == targets


def _examples_in(row, by_first):
    """The examples that a row is made of; anything else in it fails."""
    found, place = [], 0
    while place < len(row) and row[place] != Numbers.padding:
        found.append(by_first[row[place]])
        assert tuple(row[place : place + len(found[-1])]) == found[-1]
        place += len(found[-1])
    assert set(row[place:]) <= {Numbers.padding}
    return found
