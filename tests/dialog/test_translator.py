"""Translation through its interface: a glossary, and Argos Translate where it is absent or empty."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lamda.config.errors import UserError
from lamda.dialog.tools.result import Result
from lamda.dialog.tools.translator import Argos, Glossary, Translator


@pytest.fixture
def glossary(tmp_path: Path) -> Path:
    entries = [
        ("en", "fr", "hello", "bonjour"),
        ("en", "de", "good morning", "guten Morgen"),
        ("en", "fr", "Hello", "salut"),
    ]
    path = tmp_path / "glossary.jsonl"
    keys = ("source", "target", "text", "translation")
    path.write_text("".join(json.dumps(dict(zip(keys, entry, strict=True))) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("hello in French", "bonjour"),
        ("Translate 'Good morning' into German?", "guten Morgen"),
        ("translate bonjour from French to English", "hello"),
        ('"hello" to french', "bonjour"),
        ("translate\nhello  FROM english\tINTO French ?", "bonjour"),
    ],
)
def test_a_glossary_answers(glossary, query, expected):
    assert Translator(Glossary(glossary))(query) == [Result(expected)]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?",
        "hello",
        "hello in Paris",
        "135+7721",
        "in French",
        "'' in French",
        "goodbye in French",
        "from French to English",
        "x" + " " * 100_000 + "y",
        "x " * 100_000 + "in French in",
    ],
)
def test_what_asks_for_no_translation_or_has_none_gives_nothing(glossary, query):
    assert Translator(Glossary(glossary))(query) == []


def test_languages_that_a_glossary_lacks_are_said(glossary):
    with pytest.raises(UserError, match="no words from en to ja"):
        Translator(Glossary(glossary))("hello in Japanese")


def test_all_bad_lines_of_a_glossary_are_named(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"source": "en"}\nno\n[]\n{"source": "en", "target": "xx", "text": "a", "translation": "b"}\n')
    with pytest.raises(UserError) as error:
        Glossary(path)
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in str(error.value).splitlines()] == ["1", "2", "3", "4"]
    assert "'xx', which is not a known language" in str(error.value)


def test_argos_absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "argostranslate", None)
    with pytest.raises(UserError, match=r"lamda-pytorch\[translate\].*argospm install"):
        Argos()


def _argos(monkeypatch: pytest.MonkeyPatch, languages: list) -> None:
    """The part of the package's interface that the adapter calls."""
    package, module = ModuleType("argostranslate"), ModuleType("argostranslate.translate")
    module.get_installed_languages = lambda: languages
    package.translate = module
    monkeypatch.setitem(sys.modules, "argostranslate", package)
    monkeypatch.setitem(sys.modules, "argostranslate.translate", module)


def test_argos_without_a_model_says_which_to_install(monkeypatch):
    _argos(monkeypatch, [])
    with pytest.raises(UserError, match="has no model"):
        Argos()


def test_argos_translates_between_installed_languages_alone(monkeypatch):
    class Language:
        def __init__(self, code, words):
            self.code, self.words = code, words

        def get_translation(self, to):
            return self if to.code in self.words else None

        def translate(self, text):
            return self.words["fr"][text]

    _argos(monkeypatch, [Language("en", {"fr": {"hello": "bonjour"}}), Language("fr", {})])
    translator = Translator(Argos())
    assert translator("hello in French") == [Result("bonjour")]
    for query, pair in (("hello in German", "en_de"), ("bonjour from French to English", "fr_en")):
        with pytest.raises(UserError, match=f"argospm install translate-{pair}"):
            translator(query)
