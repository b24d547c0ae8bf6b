"""The encoding of a text: UTF-8, or what `charset_normalizer` finds among the usual ones."""

from __future__ import annotations

import codecs
from collections import Counter

SAMPLE = 1 << 20
"""Bytes of a text that decide its encoding."""

MARKS = {
    codecs.BOM_UTF32_LE: "utf_32",
    codecs.BOM_UTF32_BE: "utf_32",
    codecs.BOM_UTF16_LE: "utf_16",
    codecs.BOM_UTF16_BE: "utf_16",
}
"""Byte order marks, the longer ones first."""

CANDIDATES = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "cp932", "euc_jp",
    "gb18030", "big5", "euc_kr",
]  # fmt: skip
"""The usual ones; among all that Python has, more are mistaken for each other."""

LATIN = {
    "cp1252": "àâæçèéêëîïôùûüÿœ äöüß áéíñóúü àèéìîòù àáâãçéêíóôõúü åäöé åæøéòô áðéíóúýþæö ëéïöüèê àçèéíïòóúü äöüõšž",
    "cp1250": "áéíóöőúüű ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž čćđšž ăâîşţ",
    "cp1254": "âçğıîöşûü",
    "cp1257": "āčēģīķļņšūž ąčęėįšųūž",
}
"""Encodings of Latin letters, with the letters beyond ASCII of the languages that use each. They share most of their
bytes, and charset_normalizer takes French for Baltic and Croatian for French; the first of equals is the usual one."""


def encoding_of(sample: bytes) -> str | None:
    """The encoding of a text that begins with `sample`, or is it; None for UTF-8.

    Raises ValueError if it is none, as for a picture.
    """
    marked = next((name for mark, name in MARKS.items() if sample.startswith(mark)), None)
    if marked is not None:
        return marked
    if b"\0" not in sample:
        if is_utf8(sample):
            return None
        if (found := _detected(sample)) is not None:
            return found
    elif is_utf8(sample) and sample.count(b"\0") * 100 < len(sample):
        return None
    raise ValueError("not text: neither UTF-8 nor another known encoding")


def encoding_of_lines(sample: bytes) -> str | None:
    """As `encoding_of`, of JSON lines or a table. UTF-8 with damaged lines is UTF-8: they are bad one by one."""
    if not sample.startswith(tuple(MARKS)):
        lines = sample.splitlines()
        others = [line for line in lines if not line.isascii()]
        good = sum(map(is_utf8, others))  # lines in other encodings hardly ever are
        if good * 20 >= len(others) or (len(others) - good) * 100 <= len(lines):
            return None
    try:
        return encoding_of(sample)
    except ValueError:
        return None


def decoded(data: bytes) -> str:
    """A whole text, without a byte order mark. Raises ValueError if it is in no known encoding."""
    if not data.startswith(tuple(MARKS)):
        try:
            return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError:
            pass
    return data.decode(encoding_of(data[:SAMPLE]) or encoding_of(data) or "utf-8", "replace").removeprefix("\ufeff")


def is_utf8(sample: bytes) -> bool:
    """Whether it is UTF-8, of which a few characters may be damaged: another encoding would garble all of them."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)  # a sample may end inside a character
    damaged = text.count("\ufffd")
    return damaged == 0 or len(sample) - len(text) > 20 * damaged


def _detected(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes  # slow to import, and few texts need it

    best = from_bytes(sample, cp_isolation=CANDIDATES, cp_exclusion=["utf_8"]).best()
    if best is None or best.encoding not in LATIN:
        return None if best is None else best.encoding
    bytes_ = Counter(sample.translate(None, bytes(range(128))))
    return max(LATIN, key=lambda encoding: _letters_of_one_language(bytes_, encoding))


def _letters_of_one_language(counts: Counter[int], encoding: str) -> int:
    """How many of the bytes above 127 are letters of the language that has most of them."""
    letters: Counter[str] = Counter()
    for byte, count in counts.items():
        letters[bytes([byte]).decode(encoding, "replace").lower()] += count
    return max(sum(letters[letter] for letter in alphabet) for alphabet in LATIN[encoding].split())
