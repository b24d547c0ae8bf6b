"""Conversion of units: `5 miles in km`, and exact numbers as people write them."""

from __future__ import annotations

import re
from contextlib import suppress
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

from lamda.config.errors import UserError

if TYPE_CHECKING:
    from pint import Unit, UnitRegistry

LONGEST = 200
"""Maximum characters of a query."""
LARGEST = 1024
"""Maximum bits of a number's numerator or denominator, checked before each step of a calculation."""

_WORD = r"°?[^\W\d_²³]+(?:(?:\^|\*\*)[1-9](?!\d)|[²³])?"
"""A unit and at most one power of one digit: pint computes any power exactly, `m^9^9^9` for hours."""
_UNIT = rf"{_WORD}(?:(?: *[*/] *| +){_WORD}){{0,5}}"
_ASKED = re.compile(
    rf"^(?:what is |what's |convert )?([-+]?(?:\d{{1,15}}|\d{{1,3}}(?:,\d{{3}}){{1,4}})(?:\.\d{{1,15}})?)\s*"
    rf"({_UNIT})\s+(?:in|to|into|as)\s+({_UNIT})\s*\??$",
    re.IGNORECASE,
)
_POWER_WORD = re.compile(r"(?:sq|square|cubic)(?= )|(?<= )(?:squared|cubed)", re.IGNORECASE)
_POWER = re.compile(rf"{_POWER_WORD.pattern}|\^|\*\*|[²³]", re.IGNORECASE)
_TEMPERATURES = {
    **dict.fromkeys(("c", "°c", "celsius", "degrees celsius", "degree celsius", "degc"), "degree_Celsius"),
    **dict.fromkeys(("f", "°f", "fahrenheit", "degrees fahrenheit", "degree fahrenheit", "degf"), "degree_Fahrenheit"),
    **dict.fromkeys(("k", "kelvin"), "kelvin"),
}


def show(value: Fraction) -> str:
    """Digits as people write them: exact up to 30 of them, else rounded to 12, or to 6 after a long whole part."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext(prec=30) as context:
        decimal = Decimal(value.numerator) / Decimal(value.denominator)
        if context.flags[Inexact]:
            context.prec = max(12, decimal.adjusted() + 7)
            decimal = Decimal(value.numerator) / Decimal(value.denominator)
        decimal = decimal.normalize()
        return f"{decimal:f}" if decimal.adjusted() > -20 else f"{decimal:e}"


def convert(text: str) -> str | None:
    """The quantity in the requested unit, such as `8.04672 km`; None if the text requests no conversion.

    Powers of powers and results beyond `LARGEST` give None. Exact if the units are defined exactly. Raises
    UserError if pint is not installed.
    """
    asked = _ASKED.match(text.strip()) if len(text) <= LONGEST else None
    if asked is None:
        return None
    number, *units = asked.groups()
    if not all(map(_is_plain, units)):
        return None
    temperatures = [_TEMPERATURES.get(unit.lower()) for unit in units]
    if all(temperatures):  # C alone is a coulomb, F a farad
        units = [str(unit) for unit in temperatures]
    value = _converted(Fraction(number.replace(",", "")), *units)
    return None if value is None else f"{show(value)} {asked[3]}"


def _is_plain(unit: str) -> bool:
    """Whether a unit is letters and operators, and no part has a power in words next to another power.

    Pint reads `sq cubic m squared` as m**2**3**2, `msq m^9` as mm**2**9, and other raised digits than ² and ³ as
    powers of any size.
    """
    parts = re.split(r"/|(?<!\*)\*(?!\*)|\bper\b", unit, flags=re.IGNORECASE)
    return all(letter.isalpha() or letter in " °*/^123456789²³" for letter in unit) and all(
        len(_POWER.findall(part)) == 1 for part in parts if _POWER_WORD.search(part)
    )


def _converted(number: Fraction, unit: str, target: str) -> Fraction | None:
    registry = _registry()
    from pint import PintError

    try:
        converted = registry.Quantity(number, _parsed(unit)).to(_parsed(target)).magnitude
        value = Fraction(converted).limit_denominator(10**30)
    except (PintError, ArithmeticError, AssertionError, TypeError, ValueError):
        return None  # pint raises the last three for units that are not factors: dBm, octave, nan
    return value if value.numerator.bit_length() <= LARGEST else None


def _parsed(name: str) -> Unit:
    """A unit as typed, in lower case, or with its words joined: km, Miles, light year."""
    from pint import UndefinedUnitError

    *others, last = dict.fromkeys((name, name.lower(), name.lower().replace(" ", "_")))
    for spelling in others:
        with suppress(UndefinedUnitError):
            return _registry().parse_units(spelling)
    return _registry().parse_units(last)


@cache
def _registry() -> UnitRegistry[Fraction]:
    """Pint's units in exact arithmetic; takes half a second once."""
    try:
        from pint import UnitRegistry
    except ImportError as error:
        raise UserError("converting units needs pint: pip install 'lamda-pytorch[tools]'") from error
    return UnitRegistry(non_int_type=Fraction)
