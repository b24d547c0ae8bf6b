"""Strings that look like personal data or secrets: their kinds, counted. They are never shown in full.

Every pattern has bounded repetitions, and is searched only where a cheap test finds what it needs, so that hostile text
costs no more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from lamda.console import one_line

FEWEST_DIGITS = 4
"""In the shortest of the numbers, an IPv4 address."""
_NO_DIGITS = bytes(set(range(256)) - set(b"0123456789"))

_LOCAL = re.compile(r"[A-Za-z0-9._%+-]{1,64}\Z")
_EMAIL_AT = re.compile(r"@(?<=[A-Za-z0-9_%+-]@)(?=[A-Za-z0-9-]{1,63}\.)")
_EMAIL_HOST = re.compile(r"[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,6}\.[A-Za-z]{2,24}(?![A-Za-z0-9-])")
_IBAN = re.compile(r"[A-Z]{2}(?<![A-Za-z0-9]..)[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_RUN = re.compile(r"[0-9+(][0-9 .()+-]{6,}")
"""Digits and the signs between them: where the numbers below are searched, since few characters begin one."""
_IPV4 = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![.]?[0-9])(?!\w)")
_CARD = re.compile(
    r"(?<![\w.-])[3-6](?:[0-9]{12,18}|[0-9]{3}(?:[ -][0-9]{4}){3}|[0-9]{3}[ -][0-9]{6}[ -][0-9]{5})(?![\w-])"
)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+[0-9]{1,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?|[0-9]{1,4}[ .-])[0-9]{2,4}(?:[ .-]?[0-9]{2,4}){1,3}"
    r"|\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}|[0-9]{3}[.-][0-9]{3}[.-][0-9]{4})(?![\w-])"
)
_KEYS: Final = {
    "AKIA": re.compile(r"(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])"),
    "ghp_": re.compile(r"ghp_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    "hf_": re.compile(r"(?<![A-Za-z0-9_])hf_[A-Za-z]{34}(?![A-Za-z])"),
    "AIza": re.compile(r"AIza[A-Za-z0-9_-]{35}"),
    "xox": re.compile(r"xox[abprs]-[A-Za-z0-9-]{10,72}"),
    "sk-": re.compile(r"(?<![A-Za-z0-9-])sk-[A-Za-z0-9_-]{20,160}"),
    " PRIVATE KEY-----": re.compile(r"-----BEGIN (?:[A-Z]{2,10} )?PRIVATE KEY-----"),
}


def _emails(text: str) -> Iterator[str]:
    for at in _EMAIL_AT.finditer(text):
        local, host = _LOCAL.search(text[max(0, at.start() - 64) : at.start()]), _EMAIL_HOST.match(text, at.end())
        if local and host:
            yield f"{local[0]}@{host[0]}"


def _numbers(text: str) -> Iterator[tuple[str, str]]:
    """Addresses, card and phone numbers, each with its kind."""
    for run in _RUN.finditer(text):
        place = run.start(), run.end() + 1  # with the character that ends it
        if run[0].count(".") > 2:
            found = (each[0] for each in _IPV4.finditer(text, *place))
            yield from (("IPv4 address", each) for each in found if all(int(part) < 256 for part in each.split(".")))
        if len(run[0]) > 12:
            cards = (each[0] for each in _CARD.finditer(text, *place))
            yield from (("card number", each) for each in cards if _passes_luhn(re.sub(r"[ -]", "", each)))
        yield from (("phone-like number", each[0]) for each in _PHONE.finditer(text, *place))


def _ibans(text: str) -> Iterator[str]:
    return (found[0] for found in _IBAN.finditer(text) if _passes_mod_97(found[0].replace(" ", "")))


def _keys(text: str) -> Iterator[str]:
    for mark, pattern in _KEYS.items():
        if mark in text:
            yield from (found[0] for found in pattern.finditer(text))


KINDS = ("email address", "IPv4 address", "phone-like number", "card number", "IBAN", "key or secret")


def found_in(text: str, data: bytes) -> dict[str, list[str]]:
    """The distinct strings of each kind in a document. data: its UTF-8."""
    found: dict[str, list[str]] = {
        "email address": list(_emails(text)) if "@" in text else [],
        "key or secret": list(_keys(text)),
    }
    if len(data.translate(None, _NO_DIGITS)) >= FEWEST_DIGITS:
        found["IBAN"] = list(_ibans(text))
        for kind, number in _numbers(text):
            found.setdefault(kind, []).append(number)
    return {kind: list(dict.fromkeys(found[kind])) for kind in KINDS if found.get(kind)}


def masked(text: str) -> str:
    """What may be shown of a string: its first two characters and its length."""
    return f"{one_line(text[:2])}… ({len(text)} characters)"


def hidden(text: str, *, is_whole: bool) -> str:
    """A text with such strings masked. If it is cut from a longer one, its last word is left out, which may be half."""
    whole = text if is_whole else text[: max(text.rfind(" "), text.rfind("\n"), 0)]
    for strings in found_in(whole, whole.encode()).values():
        for string in strings:
            whole = whole.replace(string, masked(string))
    return whole


def _passes_luhn(digits: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812): every second digit from the right counts twice, its digits added."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0 and len(set(digits)) > 1


def _passes_mod_97(iban: str) -> bool:
    """The checksum of ISO 13616: moved to the end and with letters as numbers, it is 1 modulo 97."""
    return len(iban) >= 15 and int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1
