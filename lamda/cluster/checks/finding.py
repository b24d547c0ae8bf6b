"""Checks and their findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from lamda.config.schema import Config
from lamda.distributed import World

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warning", "failure"]
EXIT_CODES: Mapping[Level, int] = MappingProxyType({"ok": 0, "warning": 1, "failure": 2})
LEVELS: tuple[Level, ...] = tuple(EXIT_CODES)


@dataclass(frozen=True)
class Finding:
    """The result of a check. advice: how to fix it. rate: a speed; of one rank, it should equal the others."""

    level: Level
    text: str
    advice: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class Subject:
    """The input of checks: configuration, rank and device."""

    config: Config
    world: World
    device: torch.device


class Check(NamedTuple):
    """A named check. runs_on: every rank, one rank per node, or rank 0. find: the check itself."""

    name: str
    runs_on: Literal["rank", "node", "main"]
    find: Callable[[Subject], Finding]


def ok(text: str, *, rate: float | None = None) -> Finding:
    """No problem."""
    return Finding("ok", text, rate=rate)


def warning(text: str, advice: str) -> Finding:
    """The run works, but with a disadvantage."""
    return Finding("warning", text, advice)


def failure(text: str, advice: str) -> Finding:
    """The run would not work."""
    return Finding("failure", text, advice)
