"""Where the stages of a run begin and end; the keys that they change are `lamda.config.stages`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from lamda.config.values import Section, without_control_characters

_END = re.compile(r"(?i)(\d[\d_]*(?:\.\d+)?(?:e\d\d?)?) (steps|tokens)")


class End(NamedTuple):
    """The end of a stage or a run. unit: steps, or tokens: `data.sequence_length` for each row since the beginning."""

    number: int
    unit: str


class StageConfig(Section):
    """A stretch of a run: its end, and keys that have other values from its beginning on."""

    name: str | None = Field(None, description="shown by `lamda list` and in metrics.jsonl; default: its number")
    until: str | None = Field(None, description="`8000 steps` or `4e9 tokens`; the last stage ends with the run")
    data: dict[str, Any] = Field({}, description="keys of the section data")
    train: dict[str, Any] = Field({}, description="keys of the section train")

    _one_line = field_validator("name")(without_control_characters)

    @field_validator("until")
    @classmethod
    def _has_a_unit(cls, until: str | None) -> str | None:
        found = until and _END.fullmatch(until)
        if until is not None and not (found and int(number := Decimal(found[1])) == number):
            raise ValueError(f"should be `8000 steps` or `4e9 tokens`, not {until!r}")
        return until

    @property
    def end(self) -> End | None:
        """`until` as a number."""
        found = self.until and _END.fullmatch(self.until)
        return End(int(Decimal(found[1])), found[2].lower()) if found else None


class Span(NamedTuple):
    """The steps of a stage: those after step `first`, up to step `last`. tokens: before it."""

    first: int
    last: int
    tokens: int


def spans(stages: Sequence[StageConfig], *, batch: int, length: int, end: End) -> list[Span]:
    """The steps of each stage, or of a run without any. batch, length, end: the run's. Rounded up to whole steps."""
    step, tokens, found = 0, 0, list[Span]()
    for stage in stages or (StageConfig(),):
        batch = int(stage.train.get("global_batch_size", batch))
        length = int(stage.data.get("sequence_length", length))
        count, unit = stage.end or end
        last = count if unit == "steps" else step - (tokens - count) // (batch * length)
        found.append(Span(step, last, tokens))
        step, tokens = last, tokens + (last - step) * batch * length
    return found
