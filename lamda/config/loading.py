"""From a command line and a YAML file to a `Config`, or to every error at once, each with its place.

Defaults < preset < file < flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lamda.config.schema import Config
from lamda.config.settings import ConfigError, Contents, Kind, Problem, Schema, Setting, flag_place, kind, value_of

__all__ = ["KEYS", "SECTIONS", "ConfigError", "load_config", "wants_help"]

REMOVED = frozenset({"data.lanes", "data.block_rows"})
"""Keys of earlier versions: read over in files, since checkpoints hold the config.yaml that they were made with."""

SCHEMA = Schema(Config, flag="config", among="configs/*.yaml", removed=REMOVED)
SECTIONS, KEYS = SCHEMA.sections, SCHEMA.keys


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that `--config FILE` and `--section.key VALUE` flags (in `argv`) describe.

    `--local_rank N`, which DeepSpeed's launcher inserts, is ignored. Raises `ConfigError` with a line
    for everything that is wrong.
    """
    problems: list[Problem] = []
    file, flags = _read_flags(argv, problems)
    settings, sections = SCHEMA.read(file, problems) if file else Contents({}, {})
    elsewhere = None if file else (flag_place(len(argv)), "there is no --config FILE; a first run is --config tiny")
    return SCHEMA.build(Contents(settings | flags, sections), problems, elsewhere=elsewhere)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the flags ask for help instead of a run."""
    return not {"-h", "--help"}.isdisjoint(argv)


def _split(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of each flag, the value None where it is missing; a bare word has no name."""
    position = 0
    while position < len(argv):
        word, following = argv[position], argv[position + 1 : position + 2]
        position += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            yield "", word
        elif equals:
            yield name, value
        elif following and not following[0].startswith("--"):
            yield name, following[0]
            position += 1
        else:
            yield name, None


_NODES = "the number of nodes is for `lamda submit --nodes N` or `deepspeed --num_nodes N`; `lamda plan` takes --gpus"
_GPUS = (
    "the number of GPUs is for the launcher: `deepspeed --num_gpus N scripts/pretrain.py`; `lamda plan` takes --gpus"
)
_OF_LAUNCHERS = {"nodes": _NODES, "num_nodes": _NODES, "gpus": _GPUS, "num_gpus": _GPUS, "nproc_per_node": _GPUS}
"""Flags that people give here and that launchers take."""


def _read_flags(argv: Sequence[str], problems: list[Problem]) -> tuple[str | None, dict[str, Setting]]:
    """The config file's name and the overrides by dotted key; a later flag wins."""
    file, settings = None, {}
    for position, (name, value) in enumerate(_split(argv)):
        place = flag_place(position)
        if name == "local_rank":
            continue
        if not name:
            place = place._replace(prefix="")
            problems.append(Problem(place, "", f"{value}: is not a flag; write --section.key VALUE"))
        elif name in _OF_LAUNCHERS:
            problems.append(Problem(place, name, f"there is no such key; {_OF_LAUNCHERS[name]}"))
        elif name in REMOVED:
            problems.append(Problem(place, name, "is gone; leave it out (CHANGELOG.md)"))
        elif name != "config" and name not in KEYS:
            problems.append(Problem(place, name, f"there is no such key{SCHEMA.nearest_key(name)}"))
        elif value is None:
            problems.append(Problem(place, name, f"has no value; write --{name} VALUE"))
        elif name == "config" and not value:
            problems.append(Problem(place, name, "is empty; give a file, or leave the flag out"))
        elif name == "config":
            file = value
        else:
            settings[name] = Setting(_flag_value(value, wanted=kind(KEYS[name])), place)
    return file, settings


def _flag_value(text: str, *, wanted: Kind) -> Any:
    if text == "null":
        return None
    if wanted in ("text", "choice") or (wanted == "list" and not text.startswith("[")):
        return text
    try:
        return value_of(yaml.compose(text, Loader=yaml.SafeLoader), wanted=wanted)
    except yaml.YAMLError:
        return text
