"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from lamda.config.schema import Config
from lamda.distributed import World

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")


@dataclass(frozen=True)
class Finding:
    """How something is; advice: what to do where it is not as it should be.

    rate: of something that is as fast on every rank, or one of them is odd.
    """

    level: Level
    text: str
    advice: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class Subject:
    """What is looked at: a configuration, from this rank's place, with its device."""

    config: Config
    world: World
    device: torch.device


class Check(NamedTuple):
    """A name, who looks (every rank, one a node, or rank 0 alone), and the look itself."""

    name: str
    who: Literal["rank", "node", "main"]
    look: Callable[[Subject], Finding]


def ok(text: str, *, rate: float | None = None) -> Finding:
    """All is well."""
    return Finding("ok", text, rate=rate)


def warning(text: str, advice: str) -> Finding:
    """The run works, but not as well as it could."""
    return Finding("warning", text, advice)


def failure(text: str, advice: str) -> Finding:
    """The run would not work."""
    return Finding("failure", text, advice)
