"""Lines that two tokenizers are likely to read differently, the same for the same seed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence

from lamda.data.tokenizer import CONTROL_SYMBOLS, RESERVED_PIECES, SPACE_PIECE

SCALARS = [*range(0xD800), *range(0xE000, 0x110000)]
"""Every code point that text can hold."""
SPELT = [*RESERVED_PIECES, *CONTROL_SYMBOLS, "<s>", "</s>", "<|endoftext|>", "[INST]"]
"""Symbols' names, which are text like any other."""


def all_scalars(step: int = 1) -> Iterator[str]:
    """Every `step`-th code point once, 16 a line."""
    for start in range(0, len(SCALARS), 16 * step):
        yield "".join(map(chr, SCALARS[start : start + 16 * step : step]))


def hostile_lines(pieces: Sequence[str], *, seed: int) -> Iterator[str]:
    """Endless lines; pieces: of the vocabulary, whose neighbors overlap in every way."""
    draw = random.Random(seed)
    compatible = [chr(code) for code in SCALARS if unicodedata.normalize("NFKC", chr(code)) != chr(code)]
    marks = [chr(code) for code in range(0x300, 0x370)]
    kinds = (
        lambda: "".join(draw.choices(pieces, k=draw.randint(1, 12))),
        lambda: "".join(_cut(draw, draw.choice(pieces)) for _ in range(draw.randint(2, 12))),
        lambda: _cut(draw, draw.choice(pieces)) * draw.randint(2, 40),
        lambda: "".join(draw.choices(" \t\r\n\v\f", weights=(90, 4, 2, 2, 1, 1), k=draw.randint(1, 200))),
        lambda: "".join(chr(draw.randrange(0x20)) + draw.choice(["", "a", " "]) for _ in range(draw.randint(1, 20))),
        lambda: "".join(draw.choices(compatible, k=draw.randint(1, 12))),
        lambda: "".join(draw.choice("aeino") + draw.choice(marks) for _ in range(draw.randint(1, 20))),
        lambda: "".join(chr(draw.choice(SCALARS)) for _ in range(draw.randint(1, 12))),
        lambda: draw.choice(["", " ", "a"]).join(draw.choices(SPELT, k=draw.randint(1, 6))),
        lambda: "".join(draw.choices([SPACE_PIECE, " ", "a", "<", "\n"], k=draw.randint(1, 12))),
    )
    while True:
        yield draw.choice(kinds)()


def _cut(draw: random.Random, piece: str) -> str:
    start = draw.randrange(len(piece))
    return piece[start : start + draw.randint(1, len(piece))]
