"""Conversion of units: `5 miles in km`."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

from lamda.config.errors import UserError
from lamda.dialog.tools.decimals import show

if TYPE_CHECKING:
    from pint import Unit, UnitRegistry

_UNIT = r"[^\W\d_][^\W\d_ ]*(?:[ */]+[^\W\d_]+|(?:\^|\*\*)[1-9]){0,5}"
_ASKED = re.compile(
    rf"^(?:what is |what's |convert )?([-+]?(?:\d{{1,15}}|\d{{1,3}}(?:,\d{{3}}){{1,4}})(?:\.\d{{1,15}})?)\s*"
    rf"(°?{_UNIT})\s+(?:in|to|into|as)\s+(°?{_UNIT})\s*\??$",
    re.IGNORECASE,
)
_TEMPERATURES = {
    name: unit
    for unit, names in {
        "degree_Celsius": ("c", "°c", "celsius", "degrees celsius", "degree celsius", "degc"),
        "degree_Fahrenheit": ("f", "°f", "fahrenheit", "degrees fahrenheit", "degree fahrenheit", "degf"),
        "kelvin": ("k", "kelvin"),
    }.items()
    for name in names
}


def convert(text: str) -> str | None:
    """The quantity in the unit that is asked for, such as `8.04672 km`; None where the text asks for none.

    Exact where the units are defined exactly. Raises UserError where pint is not installed.
    """
    asked = _ASKED.match(text.strip())
    if asked is None:
        return None
    number, *units = asked.groups()
    temperatures = [_TEMPERATURES.get(unit.lower()) for unit in units]
    if all(temperatures):  # C alone is a coulomb, F a farad
        units = [str(unit) for unit in temperatures]
    value = _converted(Fraction(number.replace(",", "")), *units)
    return None if value is None else f"{show(value)} {asked[3]}"


def _converted(number: Fraction, unit: str, target: str) -> Fraction | None:
    registry = _registry()
    from pint import PintError

    try:
        converted = registry.Quantity(number, _parsed(unit)).to(_parsed(target)).magnitude
    except (PintError, ArithmeticError):
        return None
    return Fraction(converted).limit_denominator(10**30)


def _parsed(name: str) -> Unit:
    """A unit as typed, in small letters, or with its words joined: km, Miles, light year."""
    from pint import UndefinedUnitError

    *others, last = dict.fromkeys((name, name.lower(), name.lower().replace(" ", "_")))
    for spelling in others:
        try:
            return _registry().parse_units(spelling)
        except UndefinedUnitError:
            continue
    return _registry().parse_units(last)


@cache
def _registry() -> UnitRegistry:
    """Pint's units in exact arithmetic; half a second, once."""
    try:
        from pint import UnitRegistry
    except ImportError as error:
        raise UserError("converting units needs pint: pip install 'lamda-pytorch[tools]'") from error
    return UnitRegistry(non_int_type=Fraction)
