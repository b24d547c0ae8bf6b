"""Kinds of values in a configuration: numbers, paths, lists of patterns, and sections of keys."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
_SECRETS = re.compile(
    r"(?i)://([^/?#]*@|.*[?&#][^=&#/]*(signature|token|passw(or)?d|pwd|secret|credential|auth|key|\bsig)=)"
)
"""A user or a password in an address (also in one behind another, `simplecache::s3://...`), or in its query."""


def without_control_characters(text: str | None) -> str | None:
    """The text; a control character would break lines of scripts and logs. Raises ValueError."""
    if any(unicodedata.category(character) == "Cc" for character in text or ""):
        raise ValueError("should hold no line break or other control character")
    return text


def _path(path: str) -> str:
    without_control_characters(path)
    return os.path.expanduser(path)  # noqa: PTH111 - Path raises where there is no such home


def _without_password(pattern: str) -> str:
    if _SECRETS.search(pattern):
        raise ValueError(
            "an address must not hold a user or a password (nor a token or a signature), because the run directory and "
            "W&B would store them; download the files, or put them on the Hugging Face hub, whose token comes from "
            "HF_TOKEN"
        )
    return pattern


_Parts = BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value)
AnyPatterns = Annotated[tuple[Annotated[str, AfterValidator(_without_password)], ...], _Parts]
Patterns = Annotated[AnyPatterns, Field(min_length=1)]
Names = Annotated[tuple[str, ...], _Parts, Field(min_length=1)]
FilePath = Annotated[str, AfterValidator(_path)]
Address = Annotated[FilePath, AfterValidator(_without_password)]


class Section(BaseModel):
    """A frozen group of keys that rejects unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)
