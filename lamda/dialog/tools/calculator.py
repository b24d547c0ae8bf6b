"""Exact arithmetic from text, with a parser of its own: no text is evaluated as a program.

sum      product, then + or - product ...      `200 + 10%` adds a tenth of 200
product  signed, then * / of signed ...        `of` follows a percentage: `15% of 80`
signed   - or + signed, or power               so that -2^2 is -4
power    number, (sum) or either with %, then ^ signed
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from lamda.dialog.tools.result import Result
from lamda.dialog.tools.units import LARGEST, LONGEST, convert, show

_DEEPEST = 40

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?(?:e[+-]?\d{1,3})?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:({_NUMBER})|(\*\*|[-+*/^()%]|of\b))", re.ASCII)
_ASKED = re.compile(r"^(?:what is|what's|how much is|calculate|compute)\s+|[\s=?.]+$")
_SPELLINGS = (
    (re.compile(r"\bplus\b"), "+"),
    (re.compile(r"\bminus\b|[−–]"), "-"),
    (re.compile(r"\btimes\b|[×·]|(?<=[\d)\s])x(?=[\d(\s])"), "*"),
    (re.compile(r"\bdivided by\b|÷"), "/"),
    (re.compile(r"\bpercent\b"), "%"),
)


class Calculator:
    """The tool: `135+7721` gives 7856, `15% of 80` gives 12, `5 miles in km` gives 8.04672 km."""

    name = "calculator"

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The value or the converted quantity; nothing for other queries. Raises UserError if that needs pint."""
        value = calculate(query)
        text = convert(query) if value is None else show(value)
        return [] if text is None else [Result(text)]


def calculate(text: str) -> Fraction | None:
    """The value of an expression, or None if the text is not one, divides by zero or exceeds `LARGEST`.

    Sums and integer powers are exact; a fractional power has the precision of a float. A single number is not an
    expression, nor is a date such as 2020-01-05.
    """
    tokens = _tokens(text)
    if tokens is None or tokens.count("(") > _DEEPEST:
        return None
    if sum(token[0] in "0123456789." for token in tokens) < 2 and "%" not in tokens:
        return None
    parser = _Parser(tokens)
    try:
        value = parser.sum().number
    except (_NoExpressionError, ArithmeticError):
        return None
    return value if parser.at_end else None


class _Value(NamedTuple):
    number: Fraction
    is_percentage: bool = False


class _NoExpressionError(ValueError):
    """The tokens are not an expression, or one that is too expensive."""


class _Parser:
    """Recursive descent: one method per rule of the grammar above."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._place = 0

    @property
    def at_end(self) -> bool:
        return self._place == len(self._tokens)

    def sum(self) -> _Value:
        left = self._product()
        while sign := self._take("+", "-"):
            right = self._product()
            change = right.number if sign == "+" else -right.number
            if right.is_percentage and not left.is_percentage:
                left = _Value(_bounded(left.number * (1 + change)))
            else:
                left = _Value(_bounded(left.number + change), left.is_percentage and right.is_percentage)
        return left

    def _product(self) -> _Value:
        left = self._signed()
        while operator := self._take("*", "/", "of"):
            right = self._signed()
            if operator == "of" and not left.is_percentage:
                raise _NoExpressionError
            number = left.number / right.number if operator == "/" else left.number * right.number
            left = _Value(_bounded(number), operator == "of" and right.is_percentage)
        return left

    def _signed(self) -> _Value:
        if sign := self._take("+", "-"):
            number, is_percentage = self._signed()
            return _Value(-number if sign == "-" else number, is_percentage)
        return self._power()

    def _power(self) -> _Value:
        base = self._operand()
        if self._take("^", "**"):
            return _Value(_power(base.number, self._signed().number))
        return base

    def _operand(self) -> _Value:
        if self._take("("):
            value = self.sum()
            if not self._take(")"):
                raise _NoExpressionError
        else:
            value = _Value(self._number())
        return _Value(value.number / 100, is_percentage=True) if self._take("%") else value

    def _number(self) -> Fraction:
        if self.at_end or self._tokens[self._place][0] not in "0123456789.":
            raise _NoExpressionError
        self._place += 1
        return _bounded(Fraction(self._tokens[self._place - 1].replace(",", "")))

    def _take(self, *wanted: str) -> str | None:
        """Consume and return the next token if it is one of these."""
        if self.at_end or self._tokens[self._place] not in wanted:
            return None
        self._place += 1
        return self._tokens[self._place - 1]


def _tokens(text: str) -> list[str] | None:
    """Numbers and operators, or None if there is anything else."""
    if len(text) > LONGEST:
        return None
    text = _ASKED.sub("", text.strip().lower())
    for spelling, operator in _SPELLINGS:
        text = spelling.sub(operator, text)
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            return None
        tokens.append(found[1] or found[2])
        place = found.end()
    return tokens


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > LARGEST:
            raise OverflowError
        return _bounded(base**exponent.numerator)
    if base < 0:
        raise _NoExpressionError  # the root is not real
    return _bounded(Fraction(float(base) ** float(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST:
        raise OverflowError
    return value
