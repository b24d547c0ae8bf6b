"""Exact numbers as people write them."""

from __future__ import annotations

from decimal import Decimal, Inexact, localcontext
from fractions import Fraction


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
