"""The documents of a drop list are never trained on, all others exactly as without one, and a wrong list is refused."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.data.corpus import differences, fingerprint, open_corpus
from lamda.data.drop_list import Entry, _entries, file_entries, lines_of, position_of
from lamda.data.hashing import document_hash
from lamda.data.lanes import Cursor
from lamda.data.row_cache import RowCache
from lamda.dialog.examples import Conversations
from tests.data.ranks import BLANK, Numbers, config_of, read, write_file
from tests.data.test_loader import BOOK, SMALL, Case, cases, opened


def write(path, corpus, *entries):
    header = {"files": file_entries(corpus.files)}
    path.write_bytes(b"".join(lines_of(header, sorted(Entry(*entry) for entry in entries))))
    return str(path)


def without(config, path):
    return config.model_copy(update={"data": config.data.model_copy(update={"drop": path})})


@settings(max_examples=3, deadline=None)
@example(Case((BOOK,), most=64), 3)
@example(Case((SMALL, BOOK), weights=(1, 1), length=3), 2)
@given(cases(), st.integers(2, 5))
def test_an_epoch_has_the_other_documents_once_and_stops_change_nothing(case, nth):
    with opened(case) as (config, corpus, texts):
        documents = [" ".join(map(str, document[:-1])) for source in texts for document in source]
        dropped = {text for text in documents[::nth] if text}
        entries = [(document_hash(text), "planted") for text in dropped]
        config = without(config, write(Path(config.data.corpus).with_name("list"), corpus, *entries))
        left = open_corpus(config.data)
        assert [lane.slices for lane in left.lanes] == [lane.slices for lane in corpus.lanes]
        if not all(any(" ".join(map(str, each[:-1])) not in dropped for each in source) for source in texts):
            return  # a source without a document ends the run
        run = read(config, left, Numbers(), until=lambda step: min(step.epochs.values()) > 1 or step.consumed >= 160)
        sources, _ = left.mixture.rows(np.arange(run.consumed))
        for source, documents in enumerate(texts):
            kept = [each for each in documents if " ".join(map(str, each[:-1])) not in dropped]
            first = [window for of, window in run.windows if of == source and window.epoch == 0]
            if not first[-1].is_last:
                continue
            rows = sum(window.rows for window in first)
            ids, scored = (np.concatenate(each)[sources == source][:rows] for each in (run.ids, run.loss_mask))
            if len(ids) == rows:
                expected = Counter(id for document in kept for id in document)
                assert Counter(ids[:, 1:][scored].tolist()) == expected
        stopped, found = None, []
        for count, world in ((1, 2), (2, 3), (len(run.digests) - 3, 1)):
            row_cache = RowCache.of(config.data.cache_dir, fingerprint(left, config, Numbers()))
            stopped = read(
                config, left, Numbers(), count=max(0, count), world_size=world, after=stopped, row_cache=row_cache
            )
            found += stopped.digests
        assert found[: len(run.digests)] == run.digests[: len(found)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("shuffle", ["none", 16384])
def test_one_copy_of_a_duplicate_stays_wherever_the_file_is_cut(tmp_path, suffix, shuffle, monkeypatch):
    monkeypatch.setattr("lamda.data.partitioning.MIN_ROWS_PER_LANE", 1)
    copy = [7, 7, 7]
    for folder in ("a", "b"):  # files of one name and one content: places in them are the same
        (tmp_path / "0" / folder).mkdir(parents=True)
        write_file(tmp_path / "0" / folder / f"x{suffix}", [[n, n + 1] for n in range(10, 200)] + [copy, BLANK, copy])
    config = config_of(tmp_path, (1,), sequence_length=8, files=f"{tmp_path}/0/*/*", shuffle=shuffle)
    corpus = open_corpus(config.data)
    assert (len(corpus.lanes) > 4) == (shuffle != "none")
    (whole,) = open_corpus(config.data.model_copy(update={"shuffle": "none"})).lanes
    numbers = {file.url: number for number, file in enumerate(corpus.files)}
    places = [
        (numbers[whole.slices[document.file].file.url], position_of(document))
        for document in whole.read(Cursor())
        if document.text == "7 7 7"
    ]
    assert len(places) == 4
    kept = sorted(places)[1]
    drop = write(tmp_path / "list", corpus, (document_hash("7 7 7"), "exact duplicate", kept))
    left = open_corpus(without(config, drop).data)
    texts = Counter(document.text for document in left.documents_once())
    assert texts["7 7 7"] == 1
    assert texts.total() == 2 * 190 + 1


@pytest.fixture
def config(tmp_path):
    (tmp_path / "0").mkdir()
    write_file(tmp_path / "0/x.jsonl", [[n, n + 1] for n in range(2, 300)])
    write_file(tmp_path / "0/y.jsonl", [[n, n + 1] for n in range(300, 400)])
    return config_of(tmp_path, (1,), sequence_length=8)


def test_the_list_is_in_the_fingerprint_and_a_run_without_one_keeps_its_own(config, tmp_path):
    corpus = open_corpus(config.data)
    plain = fingerprint(corpus, config, Numbers())
    assert "drop" not in plain  # so that cached rows and checkpoints from before lists stay good
    prints = []
    for number in (2, 3):
        own = without(
            config, write(tmp_path / f"{number}.list", corpus, (document_hash(f"{number} {number + 1}"), "r"))
        )
        prints.append(fingerprint(open_corpus(own.data), own, Numbers()))
    assert differences(plain, prints[0]) == differences(prints[0], plain) == ["drop"]
    assert differences(*prints) == ["drop"]


def test_a_list_that_does_not_fit_the_text_is_refused(config, tmp_path):
    corpus = open_corpus(config.data)
    drop = write(tmp_path / "list", corpus, ("00000000000000ff", "near duplicate", (1, 0)))
    own = without(config, drop)
    open_corpus(own.data)
    with pytest.raises(UserError, match=r"keeps documents of 'y.jsonl', which this run does not read"):
        open_corpus(own.data.model_copy(update={"files": (f"{tmp_path}/0/x.jsonl",)}))
    text = (tmp_path / "0/y.jsonl").read_text()
    (tmp_path / "0/y.jsonl").write_text(text.replace("301", "302"))
    with pytest.raises(UserError, match=r"y.jsonl has changed since"):
        open_corpus(own.data)
    with pytest.raises(UserError, match="these are dialogues"):
        open_corpus(own.data.model_copy(update={"packing": "whole"}), form=Conversations.of(own))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is no drop list"),
        (b"\xff\x00", "is no drop list"),
        (b'{"text": "a document"}\n', "is no drop list"),
        (b'{"drop_list": 1, "files": []}\n{"hash": "zz", "reason": "r"}\n', "is no drop list"),
        (b'{"drop_list": 1, "files": []}\n{"hash": "01", "reason": "r", "kept": [0, 1]}\n', "is no drop list"),
        (
            b'{"drop_list": 1, "files": []}\n{"hash": "02", "reason": "r"}\n{"hash": "01", "reason": "r"}\n',
            "is no drop",
        ),
        (b'{"drop_list": 1, "files": []}\n[]\n', "is no drop list"),
        (b'{"drop_list": 1, "files": ["abc"]}\n', "is no drop list"),
        (b'{"drop_list": 1, "files": [[3, 4, 5]]}\n', "is no drop list"),
        (b'{"drop_list": 1, "files": [["x", 4, null]]}\n{"hash": "1", "reason": "r", "kept": [-5, 1]}\n', "is no drop"),
        (b'{"drop_list": 2, "files": []}\n', "is no drop list of this version"),
    ],
)
def test_what_is_no_drop_list_is_refused(config, tmp_path, content, message):
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus(without(config, str(tmp_path / "list")).data)


def test_a_list_that_changes_under_a_run_is_an_error(config, tmp_path):
    corpus = open_corpus(config.data)
    own = open_corpus(without(config, write(tmp_path / "list", corpus, (document_hash("2 3"), "r"))).data)
    write(tmp_path / "list", corpus, (document_hash("4 5"), "r"))
    _entries.cache_clear()  # as in another process
    with pytest.raises(UserError, match="has changed since the run started"):
        next(own.documents_once())


def test_a_list_names_files_so_that_they_are_found_in_another_folder(config, tmp_path):
    strange = os.fsdecode(b"y\xff.jsonl")  # not UTF-8
    (tmp_path / "0/y.jsonl").rename(tmp_path / "0" / strange)
    corpus = open_corpus(config.data)
    names = [entry[0] for entry in file_entries(corpus.files)]
    assert names == ["x.jsonl", strange]
    write(tmp_path / "list", corpus, (document_hash("2 3"), "exact duplicate", (0, 0)))
    (tmp_path / "0").rename(tmp_path / "moved")
    moved = config.data.model_copy(update={"files": (f"{tmp_path}/moved/*",), "drop": str(tmp_path / "list")})
    assert json.dumps([document.text for document in open_corpus(moved).documents_once()]).count('"2 3"') == 1
