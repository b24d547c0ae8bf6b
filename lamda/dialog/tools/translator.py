"""Translation: `hello in French`, with a user's glossary or with Argos Translate's models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from lamda.config.errors import UserError
from lamda.dialog.tools.result import Result

LANGUAGES: Mapping[str, str] = {
    "arabic": "ar", "bengali": "bn", "bulgarian": "bg", "catalan": "ca", "chinese": "zh", "czech": "cs", "danish": "da",
    "dutch": "nl", "english": "en", "esperanto": "eo", "estonian": "et", "finnish": "fi", "french": "fr",
    "german": "de",
    "greek": "el", "hebrew": "he", "hindi": "hi", "hungarian": "hu", "indonesian": "id", "irish": "ga", "italian": "it",
    "japanese": "ja", "korean": "ko", "latvian": "lv", "lithuanian": "lt", "malay": "ms", "norwegian": "nb",
    "persian": "fa", "polish": "pl", "portuguese": "pt", "romanian": "ro", "russian": "ru", "slovak": "sk",
    "slovenian": "sl", "spanish": "es", "swedish": "sv", "thai": "th", "turkish": "tr", "ukrainian": "uk", "urdu": "ur",
    "vietnamese": "vi",
}  # fmt: skip
"""English names and ISO 639-1 codes."""

_QUOTES = "\"'“”‘’«» "


class TranslationModel(Protocol):
    """A source of translations. Languages are ISO 639-1 codes."""

    def translate(self, text: str, *, source: str, target: str) -> str | None:
        """The translation, or None if there is none; raises UserError for unknown languages."""
        ...


class Translator:
    """The tool: `hello in French`, `translate "gracias" from Spanish to English`; the default source is English."""

    name = "translator"

    def __init__(self, model: TranslationModel) -> None:
        self._model = model

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The translation; nothing for other queries. Raises UserError if the languages are not available."""
        text, source, target = _parse(query) or ("", "", "")
        translation = None if source == target else self._model.translate(text, source=source, target=target)
        return [] if translation is None else [Result(translation)]


def _parse(query: str) -> tuple[str, str, str] | None:
    """(text, source, target) of a query, parsed from its end in linear time; None for other queries."""
    text, preposition, target = _last_two(query.strip().removesuffix("?"))
    if preposition not in ("in", "to", "into") or target not in LANGUAGES:
        return None
    before, preposition, source = _last_two(text)
    if preposition == "from" and source in LANGUAGES:
        text = before
    else:
        source = "english"
    verb, *rest = text.split(maxsplit=1)
    if rest and verb.lower() == "translate":
        text = rest[0]
    text = text.strip(_QUOTES)
    return (text, LANGUAGES[source], LANGUAGES[target]) if text else None


def _last_two(text: str) -> tuple[str, str, str]:
    """A text without its last two words, and these in lower case; empty if it has no more than two."""
    parts = text.rsplit(maxsplit=2)
    return (parts[0], parts[1].lower(), parts[2].lower()) if len(parts) == 3 else (text, "", "")


class Glossary:
    """A user's glossary: JSON lines `{"source": "en", "target": "fr", "text": ..., "translation": ...}`.

    Each line serves both directions; the first line wins for a repeated text. Case does not matter.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError that lists every invalid line."""
        self._words: dict[tuple[str, str, str], str] = {}
        self._pairs: set[tuple[str, str]] = set()
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); --glossary takes JSON lines") from error
        problems = [f"{path}:{number}: {p}" for number, line in enumerate(lines, 1) if line and (p := self._add(line))]
        if problems:
            raise UserError("\n".join(problems))

    def translate(self, text: str, *, source: str, target: str) -> str | None:
        """The glossary's translation."""
        if (source, target) not in self._pairs:
            raise UserError(f"the glossary has no words from {source} to {target}; add some")
        return self._words.get((source, target, text.casefold()))

    def _add(self, line: bytes) -> str | None:
        """Add a line; its problem, or None."""
        try:
            entry: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            return f"not JSON ({error})"
        if not isinstance(entry, dict):
            return "not a JSON object"
        for key in ("source", "target", "text", "translation"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                return f"{key!r} must be a string that is not empty"
        for key in ("source", "target"):
            if entry[key] not in LANGUAGES.values():
                return f"{key!r} is {entry[key]!r}, which is not a known language; give a code such as 'en' or 'fr'"
        source, target = entry["source"], entry["target"]
        text, translation = entry["text"].strip(), entry["translation"].strip()
        self._pairs |= {(source, target), (target, source)}
        self._words.setdefault((source, target, text.casefold()), translation)
        self._words.setdefault((target, source, translation.casefold()), text)
        return None


class Argos:
    """Argos Translate's offline models, a package of some 100 MB per pair of languages."""

    def __init__(self) -> None:
        """Raises UserError if the package or a model is not installed."""
        try:
            from argostranslate import translate
        except ImportError as error:
            raise UserError(
                "the translator needs Argos Translate: pip install 'lamda-pytorch[translate]', then a model, such as "
                "`argospm install translate-en_fr`; or give words of your own by --glossary FILE"
            ) from error
        self._languages = {language.code: language for language in translate.get_installed_languages()}
        if not self._languages:
            raise UserError(
                "Argos Translate has no model: install one for each pair of languages, such as "
                "`argospm install translate-en_fr`"
            )

    def translate(self, text: str, *, source: str, target: str) -> str | None:
        """The model's translation."""
        known = self._languages
        model = known[source].get_translation(known[target]) if {source, target} <= known.keys() else None
        if model is None:
            raise UserError(
                f"no model from {source} to {target} is installed; `argospm install translate-{source}_{target}`"
            )
        return model.translate(text)
