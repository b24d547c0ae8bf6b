"""The same samples on any number of ranks, with any threads, after any stop; each token once an epoch."""

import dataclasses
import tempfile
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.block_files import BlockFolder
from lamda.data.blocks import LaneReader, Part
from lamda.data.corpus import fingerprint, open_corpus, packing_of, require_a_batch
from lamda.data.documents import Encoded, RawText
from lamda.data.errors import DataError
from lamda.data.lanes import RAW_TEXT, Cursor
from lamda.data.loader import Loader, row_digest, separated
from tests.conftest import make_text, write_shard
from tests.data.ranks import BAD, BLANK, Numbers, Run, config_of, read, write_file

BATCH = 12
SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"]
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
        tuple((suffix, (first, *(() if suffix == ".txt" else lines))) for suffix, first, lines in files)
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
        patch("lamda.data.corpus.MOST", case.most),
        patch("lamda.data.lanes.LEAST_ROWS", case.least_rows),
        patch("lamda.data.lanes.CUT_COMPRESSED", (case.cut_compressed, 1 << 24)),
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
    ids, scored = (np.concatenate(each)[sources == source] for each in (run.ids, run.scored))
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
            ready = BlockFolder.of(config.data.blocks, {}) if keeps else None
            run = read(config, corpus, Numbers(), count=count, world=world, threads=threads, ready=ready)
            assert run.digests == straight.digests, kept
            assert (run.order, run.epochs) == (straight.order, straight.epochs)
            assert all(map(np.array_equal, run.scored, straight.scored))


@settings(max_examples=12, deadline=None)
@example(Case((BOOK,)), [(n, n % 4 + 1) for n in range(1, 9)])
@given(cases(), st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=5))
def test_stops_anywhere_and_resumes_on_other_ranks_lose_and_repeat_nothing(case, parts):
    with opened(case) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), count=sum(count for count, _ in parts) or 1)
        run, found = None, []
        for count, world in parts:
            run = read(config, corpus, Numbers(), count=count, world=world, after=run)
            found += run.digests
        assert found == straight.digests[: len(found)]
        if found:
            assert run.order == straight.order


def test_a_resume_without_the_windows_only_takes_longer():
    with opened(Case((BOOK, SMALL), weights=(1, 2))) as (config, corpus, _):
        straight = read(config, corpus, Numbers(), count=20)
        run = read(config, corpus, Numbers(), count=12, world=2)
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
            assert read(config, corpus, Numbers(), count=12, world=world, skipped=skipped).digests == expected


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
                read(config, corpus, Numbers(), count=2, world=world)


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
        assert read(config, corpus, Numbers(), count=len(run.digests), world=world).digests == run.digests
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
    with patch("lamda.data.lanes.LEAST_ROWS", 20):
        corpus = open_corpus(config.data)
    assert len(corpus.lanes) > 4
    return corpus


def micro_batches(config, corpus, tokenizer, *, count=1, rank=0, world=1, micro_batch=3, **more):
    with Loader(
        corpus, tokenizer, packing=packing_of(config), seed=5, batch=BATCH, micro_batch=micro_batch, rank=rank,
        world=world, **more,
    ) as loader:  # fmt: skip
        return [each for step in islice(loader, count) for each in step.micro_batches]


def test_micro_batches_hold_the_same_rows_on_any_number_of_ranks(config, corpus, tokenizer):
    with patch("lamda.data.windows.FIRST_TOKENS", 2000):
        order = read(config, corpus, tokenizer, count=1).order

    def rows(world):
        found = [micro_batches(config, corpus, tokenizer, rank=rank, world=world, order=order) for rank in range(world)]
        return [each.ids.tobytes() for rank in found for each in rank]

    assert rows(1) == rows(2) == rows(4)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_under_a_document_mask_the_end_symbol_begins_the_next_document(config, corpus, tokenizer, method):
    """Every pair of neighbours is judged by the documents that they come from, token by token."""
    packing = dataclasses.replace(packing_of(config), method=method)
    end, kinds = tokenizer.end_of_document, set()
    for lane in corpus.lanes:
        block = LaneReader(lane, tokenizer, packing).read(Part(0, Cursor(), None)).block
        origin = [[None] * (packing.length + 1) for _ in block.ids]
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
    """Whether the token at `place` is the end symbol before a document's first one."""
    if place + 1 == len(origin) or ids[place] != end or origin[place + 1] is None:
        return False
    return (origin[place] is None or origin[place + 1][0] != origin[place][0]) and origin[place + 1][1] == 0


def test_a_document_mask_changes_no_token_and_leaves_every_target_of_the_usual_packing(config, corpus, tokenizer):
    made = (micro_batches(config, corpus, tokenizer, count=60, document_mask=mask) for mask in (True, False))
    ends = 0
    for masked, plain in zip(*made, strict=True):
        assert np.array_equal(masked.ids, plain.ids)
        assert plain.documents is None
        assert np.array_equal(masked.scored, plain.scored)
        inner = plain.scored[:, 1:]  # whose input is no context, and whose target no padding
        opens = masked.ids[:, 1:-1] == tokenizer.end_of_document
        changes = masked.documents[:, 1:-1] != masked.documents[:, :-2]
        assert np.array_equal(changes[inner], opens[inner])
        ends += int(opens[inner].sum())
    assert ends > 5


def test_targets_carry_their_domain_and_unknown_ones_count_as_one(tmp_path, config, tokenizer):
    for number, domain in enumerate(["b", "a", "new"]):
        write_shard(tmp_path / f"{number}.jsonl", [make_text(n, 30 + 9 * number) for n in range(9)], domain=domain)
    with patch("lamda.data.lanes.LEAST_ROWS", 15):
        corpus = open_corpus(config.data.model_copy(update={"files": (f"{tmp_path}/*",)}))
    assert len(corpus.lanes) > 2
    assert corpus.domains() == ["a", "b", "new"]
    run = read(config, corpus, tokenizer, domains=["a", "b"], until=lambda step: step.epochs["files"] >= 1)
    end = next(window.base + window.rows for _, window in run.windows if window.is_last)
    scored, domains = (np.concatenate(each)[:end] for each in (run.scored, run.domains))
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
        assert np.array_equal(part.scored, part.ids[:, 1:] % 3 == 0)


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
