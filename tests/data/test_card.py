"""A card that cannot be is refused with file, line and the nearest key, never with a traceback."""

from pathlib import Path

import pytest

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.card import load_card

SOUND = """\
name: c
description: d
sources:
  - name: web
    license: none
    files: a.jsonl
"""


def load(folder: Path, text: str | bytes):
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_card(Config.model_validate({"data": {"corpus": str(path)}, "train": {"steps": 1}}).data)


def test_a_sound_card_is_read(tmp_path):
    assert [source.files for source in load(tmp_path, SOUND).sources] == [("a.jsonl",)]
    assert load(tmp_path, SOUND.replace("d\n", "&d d\nhomepage: *d\n")).homepage == "d"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOUND + "homepag: x\n", r"c\.yaml:7: homepag: there is no such key; did you mean 'homepage'\?"),
        (SOUND + "    wieght: 2\n", r"c\.yaml:7: sources\.0\.wieght: there is no such key; did you mean 'weight'\?"),
        (
            SOUND + "    checksums:\n      a.jsonl: {size: 1, sha265: x}\n",
            r"c\.yaml:8: sources\.0\.checksums\.a\.jsonl\.sha265: there is no such key; did you mean 'sha256'\?",
        ),
        (
            SOUND.replace("files: a.jsonl", "dataset: {path: p, revison: r}"),
            r"c\.yaml:6: sources\.0\.dataset\.revison: there is no such key; did you mean 'revision'\?",
        ),
        (SOUND + "changes: [{at_samples: 1, weights: {}}]\n", r"c\.yaml:7: .*did you mean 'at_sample'\?"),
        (SOUND + "    weight: heavy\n", r"c\.yaml:7: sources\.0\.weight: Input should be a valid number"),
        (SOUND.replace("    license: none\n", ""), r"c\.yaml:4: sources\.0\.license: Field required"),
        (SOUND + "  - {name: web, license: none, files: b}\n", r"c\.yaml:3: sources: two sources are called 'web'"),
        (SOUND + "    files: b.jsonl\n", r"c\.yaml:7: files: appears twice; remove one"),
        (SOUND + "homepage: 2024-13-45\n", r"c\.yaml: this is not YAML: month must be in 1\.\.12"),
        (SOUND + "\thomepage: x\n", r"c\.yaml:7: this is not YAML: found character"),
        (SOUND + "changes: &a [*a]\n", r"c\.yaml:7: changes\.0: Input should be"),
        ("", r"c\.yaml:1: name: Field required"),
        ("- a\n", r"c\.yaml:1: a card holds `key: value` lines"),
        (b"name: \xff\n", r"c\.yaml: cannot be read .*utf-8"),
        ("[" * 3000, r"c\.yaml: this is not YAML"),
    ],
)
def test_a_fault_is_reported_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_nothing_that_a_card_says_of_its_text_holds_for_files_that_a_run_names():
    def card(**data):
        return load_card(Config.model_validate({"data": {"corpus": "pile", **data}, "train": {"steps": 1}}).data)

    published, own = card(), card(files="mine/*.jsonl")
    assert (own.name, own.homepage, own.validation, own.changes, own.domains) == ("data.files", None, (), (), ())
    assert own.description != published.description
    assert [(source.files, source.license) for source in own.sources] == [(("mine/*.jsonl",), "not stated")]
    assert own.sources[0].domain == published.sources[0].domain
    both = card(files="mine/*.jsonl", eval_files="held.jsonl")
    assert [(source.files, source.license) for source in both.validation] == [(("held.jsonl",), "not stated")]
    held = card(eval_files="held.jsonl")
    assert (held.name, held.sources) == (published.name, published.sources)
    assert [source.license for source in held.validation] == ["not stated"]


def test_the_earlier_spelling_of_license_is_read_and_both_are_an_error(tmp_path):
    assert load(tmp_path, SOUND.replace("license:", "licence:")) == load(tmp_path, SOUND)
    with pytest.raises(UserError, match=r"c\.yaml:6: sources\.0\.licence: there is no such key"):
        load(tmp_path, SOUND.replace("    license: none\n", "    license: none\n    licence: none\n"))
