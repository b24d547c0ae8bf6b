"""A training row is found with no more of the text, or of what a run has kept, than is needed for it."""

import json
from collections import Counter

import numpy as np
import pytest

from lamda.config.loading import load_config
from lamda.data import windows
from lamda.data.blocks import LaneReader
from lamda.data.corpus import fingerprint, open_corpus, packing_of
from lamda.data.drop_list import Entry, file_entries, lines_of
from lamda.data.files import read_lines
from lamda.data.hashing import document_hash
from lamda.data.loader import Loader, batch_digest
from lamda.data.order import consumed_after, next_samples
from lamda.data.row_cache import RowCache
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import SourceOrder
from lamda.runs import trace as module
from lamda.runs.trace import trace
from lamda.storage.run_directory import RunDirectory
from lamda.storage.window_log import WindowLog
from tests.conftest import make_text, write_shard

BATCH = 16


class Training:
    """A run's files, as training leaves them."""

    def __init__(self, path, tokenizer_path, text, **data):
        self.directory = RunDirectory(path)
        self.directory.create()
        data = {"files": [str(text)], "eval_files": [str(text)], "sequence_length": 16, **data}
        train = {"steps": 99, "global_batch_size": BATCH, "micro_batch_size": BATCH}
        self.directory.config.write_text(json.dumps({"model": {"vocab_size": 400}, "data": data, "train": train}))
        self.directory.tokenizer.write_bytes(tokenizer_path.read_bytes())
        self.consumed, self.order, self.steps = 0, (), 0

    def train(self, steps):
        """Take steps, and log them and their windows."""
        config = load_config(["--config", str(self.directory.config)])
        corpus, tokenizer = open_corpus(config.data), Tokenizer.load(self.directory.tokenizer)
        row_cache = config.data.cache_dir and RowCache.of(config.data.cache_dir, fingerprint(corpus, config, tokenizer))
        log = WindowLog(self.directory.order)
        log.begin(self.order)
        loader = Loader(
            corpus, tokenizer, packing=packing_of(config), seed=config.run.seed, batch=BATCH, micro_batch=BATCH,
            rank=0, world_size=1, consumed=self.consumed, order=self.order, row_cache=row_cache, on_window=log.add,
        )  # fmt: skip
        with loader, self.directory.metrics.open("a") as rows:
            for _, step in zip(range(steps), loader, strict=False):
                self.steps += 1
                digest = batch_digest(step.digests[np.argsort(step.positions)])
                row = {"step": self.steps, "samples": self.steps * BATCH, "batch_digest": digest}
                rows.write(json.dumps(row) + "\n")
                self.consumed, self.order = step.consumed, loader.order()
        self.lanes = len(corpus.lanes)
        return self

    def rows(self, step):
        """All rows of a step; their text is compared with the step's digest."""
        found = list(trace(self.directory, step=step, row=None))
        assert [row for row, _ in found] == list(range(BATCH))
        return found


@pytest.fixture
def text(tmp_path):
    return write_shard(tmp_path / "text.jsonl", [make_text(n, 40) for n in range(400)])


@pytest.fixture
def begin(tmp_path, tokenizer_path, text, monkeypatch):
    """A run, of windows of some 30 rows."""
    monkeypatch.setattr(windows, "FIRST_TOKENS", 512)
    return lambda name="run", **data: Training(tmp_path / name, tokenizer_path, text, **{"shuffle": 8, **data})


@pytest.fixture
def calls(monkeypatch):
    """How often what is slow was called."""
    counts = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*args, **named):
            counts[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(owner, name, counted)

    count(LaneReader, "__init__")
    count(LaneReader, "read")
    count(module, "places")
    count(SourceOrder, "from_json")
    return counts


def windows_of(training):
    """The order of each line that was kept."""
    return [json.loads(line)["windows"] for line in training.directory.order.read_text().splitlines()]


def test_a_step_is_found_by_its_windows_alone(begin, calls):
    run = begin().train(40)
    assert run.lanes > 8
    assert len(windows_of(run)) > 10
    calls.clear()
    for step in (1, 20, 39):
        calls.clear()
        run.rows(step)
        of_step = calls["places"]
        assert of_step <= 3, "each window is arranged once"
        assert calls["from_json"] <= 3, "and no other is parsed"
        assert calls["read"] <= min(BATCH, of_step * run.lanes)
        assert calls["__init__"] <= run.lanes


def test_lines_are_counted_once_and_rightly(begin, monkeypatch, text):
    run, read = begin().train(1), []
    monkeypatch.setattr(module, "read_lines", lambda *args, **named: map(noted(read), read_lines(*args, **named)))
    lines = text.read_text().splitlines()
    pieces = [piece for _, pieces in run.rows(1) for piece in pieces]
    assert len({piece.line for piece in pieces}) > BATCH / 2
    for piece in pieces:
        assert piece.text.strip() in json.loads(lines[piece.line - 1])["text"]
    assert len(read) < len(lines) + run.lanes, "the first line of each lane is read again for the next"


def noted(found):
    def note(each):
        found.append(each)
        return each

    return note


@pytest.mark.parametrize("lost", ["one", "all"])
def test_a_window_that_was_not_kept_is_made_once(begin, calls, lost):
    run = begin().train(12)
    lines = run.directory.order.read_text().splitlines(keepends=True)
    number = max(place for place, (window,) in enumerate(windows_of(run)) if window["base"] <= 8 * BATCH)
    kept = [] if lost == "all" else [*lines[:number], lines[number][:900] + "\n", *lines[number + 1 :]]
    run.directory.order.write_text("".join(kept))
    calls.clear()
    run.rows(9)
    made = number + 2 if lost == "all" else 1
    assert calls["read"] <= made * run.lanes + BATCH
    assert calls["__init__"] <= run.lanes


def test_lines_that_hold_no_window_are_left_out(begin):
    run = begin().train(6)
    good = run.directory.order.read_text()
    first = json.loads(good.splitlines()[0])
    (window,) = first["windows"]
    others = [
        {"counts": [1.5] * run.lanes},
        {"counts": []},
        {"starts": [[0]] * run.lanes},
        {"until": "x"},
        {name: window[name][:1] for name in ("counts", "starts", "afters")},
    ]
    bad = ["[1]", "null", "", '{"source":0,"windows":[],"measured":[1,1]}', "\0" * 40]
    for number, other in enumerate(others, start=900):
        values = {**first, "windows": [{**window, "number": number, **other}]}
        bad.append(json.dumps(values, separators=(",", ":")))
    run.directory.order.write_text("\n".join(bad) + "\n" + good + "\n".join(bad))
    for step in (1, 4, 6):
        run.rows(step)


def test_a_run_from_another_runs_checkpoint_knows_the_windows_that_came_with_it(begin, calls):
    first, second = begin().train(9), begin("second")
    second.consumed, second.order, second.steps = first.consumed, first.order, first.steps
    second.train(1)
    calls.clear()
    second.rows(10)
    assert calls["read"] <= BATCH
    assert second.rows(10) == [*trace(first.train(1).directory, step=10, row=None)]


@pytest.mark.parametrize("shuffle", ["epoch", 8])
def test_cached_rows_are_read_and_not_made(begin, calls, tmp_path, shuffle):
    folder = tmp_path / "blocks"
    run = begin(shuffle=shuffle, cache_dir=str(folder)).train(6)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    calls.clear()
    found = run.rows(5)
    run.directory.order.unlink()
    assert run.rows(5) == found
    assert calls["read"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("state", ["gone", "damaged", "fingerprint"])
def test_rows_that_are_not_ready_are_made(begin, tmp_path, state):
    folder = tmp_path / "blocks"
    run = begin(cache_dir=str(folder)).train(3)
    found = run.rows(2)
    if state == "gone":
        folder.rename(tmp_path / "elsewhere")
    for path in folder.rglob("*.rows" if state == "damaged" else "fingerprint.json"):
        path.write_bytes(b"{")
    before = {*tmp_path.rglob("*")}
    assert run.rows(2) == found
    assert before == {*tmp_path.rglob("*")}


def test_the_place_of_a_late_step_needs_no_list_of_the_samples_before():
    assert consumed_after(10**15, [(10**14, 2 * 10**14), (5, 9)]) == 10**15 + 10**14 + 4
    draw = np.random.default_rng(0)
    for _ in range(300):
        starts = draw.integers(0, 60, draw.integers(0, 5)).tolist()
        skipped = [(start, start + int(draw.integers(0, 12))) for start in starts]
        count = int(draw.integers(1, 60))
        assert consumed_after(count, skipped) == next_samples(0, count, skipped)[1]
    assert consumed_after(0, [(0, 5)]) == 0


def test_a_row_of_a_run_with_a_drop_list_has_no_text_of_it_and_names_it(begin, text, tmp_path, capsys):
    corpus = open_corpus(load_config(["--data.files", str(text), "--train.steps", "1"]).data)
    texts = [document.text for document in corpus.documents_once()]
    dropped = set(texts[::3])
    entries = sorted(Entry(document_hash(each), "planted") for each in dropped)
    (tmp_path / "list").write_bytes(b"".join(lines_of({"files": file_entries(corpus.files)}, entries)))
    run = begin(drop=str(tmp_path / "list")).train(4)
    lines = {piece.line for _, pieces in run.rows(4) for piece in pieces}
    written = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert lines
    assert not any(written[line - 1] in dropped for line in lines)
    assert module.main([str(run.directory.path), "--step", "4", "--row", "0"]) == 0
    assert f"step 4, row 0, without the texts of {tmp_path}/list" in capsys.readouterr().out
