"""From a command line and a YAML file to a `Config`, or to a list of all errors, each with its place.

Defaults < preset < file < flags.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lamda.config.schema import Config
from lamda.config.settings import (
    ConfigError,
    Contents,
    Kind,
    Place,
    Problem,
    Schema,
    Setting,
    flag_place,
    item_name,
    kind,
    value_of,
)
from lamda.config.stages import stage_problems

REMOVED = frozenset({"data.lanes", "data.block_rows"})
"""Keys of earlier versions, ignored in files: a checkpoint keeps the config.yaml that it was made with."""
DEPRECATED: dict[str, str] = {
    "run.compare_every": "run.weight_check_every",
    "run.stop_before_end": "run.stop_margin_seconds",
    "run.hang_seconds": "run.hang_timeout_seconds",
    "train.rollbacks": "train.max_rollbacks",
    "train.max_bad_steps": "train.max_skipped_steps",
    "data.blocks": "data.cache_dir",
    "data.max_bad_fraction": "data.max_bad_line_fraction",
}
"""Earlier names of keys, still read in flags and files."""

NO_STAGES = "--stages=null"

SCHEMA = Schema(Config, flag="config", among="configs/*.yaml", removed=REMOVED, deprecated=DEPRECATED)
SECTIONS, KEYS = SCHEMA.sections, SCHEMA.keys

log = logging.getLogger(__name__)


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that `--config FILE` and `--section.key VALUE` flags (in `argv`) describe.

    `--stages=null` leaves the stages out. `--local_rank N`, which DeepSpeed's launcher inserts, is ignored. An earlier
    name of a key is read with a warning, without one in the config.yaml of a run. Raises `ConfigError` with one line
    per problem.
    """
    problems: list[Problem] = []
    argv, is_staged = _without_stages(argv)
    file, flags = _read_flags(argv, problems)
    settings, sections, items = SCHEMA.read(file, problems) if file else Contents({}, {}, {})
    is_saved = file is not None and Path(file).name == "config.yaml"
    for setting in (*(() if is_saved else settings.values()), *flags.values()):
        if setting.old_name:
            new_name = DEPRECATED[setting.old_name]
            log.warning("%s%s is now %s", setting.place.prefix, setting.old_name, new_name)
    elsewhere = None if file else (flag_place(len(argv)), "there is no --config FILE; a first run is --config tiny")
    contents = Contents(settings | flags, sections, items if is_staged else {})
    config = SCHEMA.build(contents, problems, elsewhere=elsewhere)
    _check_stages(config, sections)
    return config


def _without_stages(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The flags without `--stages=null`, and whether it was missing: it leaves the file's stages out."""
    left = [flag for flag in argv if flag != NO_STAGES]
    return left, len(left) == len(argv)


def _check_stages(config: Config, places: Mapping[str, Place]) -> None:
    """Raise ConfigError with a line for each mistake in the stages."""
    problems = []
    for index, key, text in stage_problems(config) if config.stages else ():
        known = (f"stages.{index}.{key}", f"stages.{index}", "stages")
        place = next((places[name] for name in known if name in places), flag_place(0))
        problems.append(Problem(place, item_name("stages", index, key), text))
    if problems:
        raise ConfigError("\n".join(map(str, sorted(problems))))


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
"""Flags that belong to launchers and other commands."""


def _read_flags(argv: Sequence[str], problems: list[Problem]) -> tuple[str | None, dict[str, Setting]]:
    """The config file's name and the overrides by dotted key; a later flag wins."""
    file: str | None = None
    settings: dict[str, Setting] = {}
    list_key: str | None = None  # of the flag before, to which bare words belong: an unquoted glob is many
    for position, (name, value) in enumerate(_split(argv)):
        place = flag_place(position)
        if name == "local_rank":
            continue
        if not name and list_key is not None:
            before = settings[list_key]
            values = before.value if isinstance(before.value, list) else [before.value]
            settings[list_key] = before._replace(value=[*values, value])
            continue
        list_key = None
        if not name:
            place = place._replace(prefix="")
            problems.append(Problem(place, "", f"{value}: is not a flag; write --section.key VALUE"))
        elif name in _OF_LAUNCHERS:
            problems.append(Problem(place, name, f"there is no such key; {_OF_LAUNCHERS[name]}"))
        elif name in REMOVED:
            problems.append(Problem(place, name, "is gone; leave it out (CHANGELOG.md)"))
        elif name != "config" and DEPRECATED.get(name, name) not in KEYS:
            problems.append(Problem(place, name, f"there is no such key{SCHEMA.nearest_key(name)}"))
        elif value is None:
            problems.append(Problem(place, name, f"has no value; write --{name} VALUE"))
        elif name == "config" and not value:
            problems.append(Problem(place, name, "is empty; give a file, or leave the flag out"))
        elif name == "config":
            file = value
        else:
            key, old_name = SCHEMA.renamed(name)
            if key in settings and settings[key].old_name != old_name:
                problems.append(Problem(place, name, SCHEMA.given_twice(key)))
            settings[key] = Setting(_flag_value(value, wanted=kind(KEYS[key])), place, old_name)
            list_key = key if kind(KEYS[key]) == "list" and value != "null" else None
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
