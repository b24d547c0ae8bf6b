"""The encoding of a text: UTF-8, or what `charset_normalizer` finds among the usual ones."""

from __future__ import annotations

import codecs

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

    found = from_bytes(sample, cp_isolation=CANDIDATES, cp_exclusion=["utf_8"])
    best = found.best()
    if best is None:
        return None
    # Most letters of western languages are valid in cp1250 too, where a few are others: the more frequent one wins.
    western = next((each for each in found if each.encoding == "cp1252" and each.chaos <= best.chaos), None)
    return western.encoding if western is not None and best.encoding == "cp1250" else best.encoding
