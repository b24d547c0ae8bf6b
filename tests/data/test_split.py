"""Own text without validation text: a share of its documents is held out, and training never sees their text."""

import json
import re

import pytest

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data import resolving, split
from lamda.data.card import load_card
from lamda.data.corpus import fingerprint, open_corpus
from lamda.data.files import File
from lamda.data.held_out import HeldOut
from lamda.data.resolving import resolve
from lamda.data.split import held_out_file, held_out_source, open_text
from tests.conftest import make_text
from tests.data.ranks import Numbers


def config_of(folder, **data):
    values = {"corpus": "standard_library", "files": str(folder / "text"), "sequence_length": 16, **data}
    return Config.model_validate({"run": {"dir": str(folder / "run")}, "data": values, "train": {"steps": 1}})


@pytest.fixture
def folder(tmp_path):
    """400 documents of about 500 bytes, 100 of them twice, in lines and files of their own."""
    texts = [make_text(n, 80) for n in range(400)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts[:300]), "utf-8")
    for n, each in enumerate(texts[200:]):
        (tmp_path / f"text/{n:03}.txt").write_text(each, "utf-8")
    return tmp_path


def trained_on(corpus):
    return [document.text for document in corpus.documents_once()]


def held_out(corpus):
    return [document.text for document in HeldOut(corpus.card.validation, Numbers(), 16).documents()]


def test_held_out_text_is_never_trained_on_and_nothing_else_is_lost(folder, monkeypatch):
    monkeypatch.setattr(split, "LEAST", 9000)
    config = config_of(folder)
    every = trained_on(open_corpus(config.data))
    corpus = open_text(config)
    train, held = trained_on(corpus), held_out(corpus)
    assert sorted([*train, *(text for text in every if text in held)]) == sorted(every)
    assert not set(train) & set(held)
    assert len(held) == len(set(held))
    assert 9000 <= sum(len(text.encode()) for text in held) < 11_000
    assert len(every) - len(train) > len(held)  # duplicates leave with their first one
    content = held_out_file(folder / "run").read_bytes()
    again = open_text(config)
    assert (held_out_file(folder / "run").read_bytes(), again.held_out) == (content, corpus.held_out)


def test_the_split_is_in_the_fingerprint_and_belongs_to_its_checkpoint(folder):
    config = config_of(folder)
    saved = json.loads(json.dumps(fingerprint(open_text(config), config, Numbers())))
    assert saved["held_out"][0] > 1
    assert open_text(config_of(folder, held_out=0.1), saved=saved).held_out == saved["held_out"]
    (source,) = [held_out_source(folder / "run", saved)]
    assert source.files == (str(held_out_file(folder / "run")),)
    lines = held_out_file(folder / "run").read_bytes()
    held_out_file(folder / "run").write_bytes(lines.split(b"\n", 1)[1])
    with pytest.raises(UserError, match="held-out text is not that of the checkpoint; give --files"):
        held_out_source(folder / "run", saved)
    assert open_text(config, saved=saved).held_out == saved["held_out"]  # chosen and written again
    assert held_out_file(folder / "run").read_bytes() == lines
    held_out_file(folder / "run").unlink()
    with pytest.raises(UserError, match="is missing"):
        held_out_source(folder / "run", saved)


def test_a_run_that_began_without_a_split_continues_without_one(folder):
    config = config_of(folder)
    before = open_corpus(config.data, whole_texts=True)
    old = json.loads(json.dumps(fingerprint(before, config, Numbers())))
    now = open_text(config, saved=old)
    assert json.loads(json.dumps(fingerprint(now, config, Numbers()))) == old
    assert not held_out_file(folder / "run").exists()
    assert open_text(config_of(folder, held_out=0)).held_out is None
    given = open_text(config_of(folder, eval_files=str(folder / "text/a.jsonl")))
    assert (given.held_out, len(trained_on(given))) == (None, 500)


def test_a_long_text_of_an_earlier_run_stays_one_document(folder):
    (folder / "text/long.txt").write_text("word " * 300_000)
    config = config_of(folder)
    whole, cut = (open_corpus(config.data, whole_texts=each) for each in (True, False))
    assert "word " * 300_000 in trained_on(whole)
    assert "word " * 300_000 not in trained_on(cut)
    assert "texts" in fingerprint(cut, config, Numbers())
    assert "texts" not in fingerprint(whole, config, Numbers())


def test_text_that_cannot_be_divided_is_not(folder, caplog):
    for path in (folder / "text").iterdir():
        path.unlink()
    (folder / "text/one.txt").write_text(make_text(0, 99))
    assert open_text(config_of(folder)).held_out is None
    assert "no text is held out" in caplog.text


def test_a_text_that_is_a_tenth_of_the_corpus_in_copies_is_not_held_out(folder):
    common, rare = make_text(900, 80), [make_text(n, 80) for n in range(60)]
    lines = [json.dumps({"text": text}) + "\n" for text in [common] * 30 + rare]
    for path in (folder / "text").iterdir():
        path.unlink()
    (folder / "text/a.jsonl").write_text("".join(lines))
    corpus = open_text(config_of(folder, held_out=0.1))
    assert common not in held_out(corpus)
    assert 90 > len(trained_on(corpus)) >= 80
    (folder / "text/a.jsonl").write_text("".join(lines[:30]))
    assert open_text(config_of(folder, held_out=0.1)).held_out is None


@pytest.mark.parametrize("name", ["pile", "lamda_mixture", "standard_library", "dialog", "dialog_with_tools"])
def test_every_shipped_card_names_files_that_can_be_opened(name, tmp_path, monkeypatch):
    """Globs of the hub are answered with a file of each name, whose text is local."""
    text = json.dumps({"text": "a", "meta": {"pile_set_name": "b"}}).encode() + b"\n"
    asked = []

    def stat_file(url, on_wait):
        asked.append(url)
        return File(url, len(text), content="c", address="http://localhost/" + url)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolving, "write_corpus", lambda folder: None)
    monkeypatch.setattr(resolving, "_hub_files", lambda dataset, source: [f"hf://datasets/{dataset.path}/0.parquet"])
    monkeypatch.setattr(resolving, "_matching", lambda pattern, source: [f"hf://{re.sub('[*?]', 'x', pattern)}"])
    monkeypatch.setattr(resolving, "stat_file", stat_file)
    card = load_card(Config.model_validate({"data": {"corpus": name}, "train": {"steps": 1}}).data)
    for source in (*card.sources, *card.validation):
        files = resolve(source.model_copy(update={"checksums": {}}))
        assert files, source
        assert all(file.records in ("lines", "json", "rows") for file in files), files
