"""From a command line and a YAML file to a `Config`, or to every error at once, each with its place.

Defaults < preset < file < flags. The file is read as YAML nodes, so that each key's line is known;
pydantic checks the merged values, and each of its errors is told at the line or flag it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lamda.config.errors import UserError
from lamda.config.presets import nearest
from lamda.config.resources import find
from lamda.config.schema import Config, Section

Kind = Literal["integer", "number", "boolean", "text", "choice", "list"]

SECTIONS: Mapping[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}
KEYS: Mapping[str, FieldInfo] = {
    f"{name}.{key}": field for name, section in SECTIONS.items() for key, field in section.model_fields.items()
}
# YAML's idea of a value counts only where the field wants that type: a run may be called `1e3` or `off`,
# and `steps: yes` is not one step.
_TAGS = {"integer": ("int", "float"), "number": ("int", "float"), "boolean": ("bool",)}


class ConfigError(UserError):
    """Everything that is wrong with a configuration, a line each."""


class _Place(NamedTuple):
    """Where a value came from; places sort as a reader meets them, the file before the flags."""

    source: Literal[0, 1]
    position: int
    prefix: str


class _Setting(NamedTuple):
    value: Any
    place: _Place


class _Problem(NamedTuple):
    place: _Place
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.place.prefix}{self.key}: {self.text}" if self.key else f"{self.place.prefix}{self.text}"


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that `--config FILE` and `--section.key VALUE` flags (in `argv`) describe.

    `--local_rank N`, which DeepSpeed's launcher inserts, is ignored. Raises `ConfigError` with a line
    for everything that is wrong.
    """
    problems: list[_Problem] = []
    file, flags = _read_flags(argv, problems)
    settings, sections = _read_file(file, problems) if file else ({}, {})
    settings |= flags
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, setting in settings.items():
        section, key = name.split(".")
        values[section][key] = setting.value
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            section, key, *item = each["loc"]
            name = f"{section}.{key}"
            setting = settings.get(name)
            place = setting.place if setting else sections.get(section)
            text = " ".join([f"item {number + 1}" for number in item] + [_plain(each)])
            if place:
                problems.append(_Problem(place, name, text))
            elif not file:
                problems.append(_Problem(_flag(len(argv)), name, f"{text} (there is no --config FILE)"))
    if problems:
        raise ConfigError("\n".join(map(str, sorted(problems))))
    return config


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the flags ask for help instead of a run."""
    return not {"-h", "--help"}.isdisjoint(argv)


def kind(field: FieldInfo) -> Kind:
    """What a key takes, in plain words."""
    names = {int: "integer", float: "number", bool: "boolean", str: "text", Literal: "choice", tuple: "list"}
    return next(names[get_origin(member) or member] for member in _members(field.annotation))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a key of kind `choice` takes."""
    return get_args(next(_members(field.annotation)))


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif annotation is not NoneType:
        yield annotation


def _nearest_key(name: str) -> str:
    """`"; did you mean 'train.lr'?"`: the key whose name, last part or description is most like `name`."""
    section, _, last = name.rpartition(".")

    def alike(first: str, second: str) -> float:
        return difflib.SequenceMatcher(None, first, second).ratio()

    def likeness(key: str) -> tuple[float, float]:
        of_section, of_last = key.split(".")
        described = alike(last.replace("_", " "), KEYS[key].description)
        whole = 0.0 if section else alike(name, key)
        return max(alike(last, of_last), described, whole), alike(section, of_section)

    best = max(KEYS, key=likeness)
    return f"; did you mean {best!r}?" if likeness(best)[0] >= 0.6 else ""


def _flag(position: int) -> _Place:
    return _Place(1, position, "--")


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


def _read_flags(argv: Sequence[str], problems: list[_Problem]) -> tuple[str | None, dict[str, _Setting]]:
    """The config file's name and the overrides by dotted key; a later flag wins."""
    file, settings = None, {}
    for position, (name, value) in enumerate(_split(argv)):
        place = _flag(position)
        if name == "local_rank":
            continue
        if not name:
            place = place._replace(prefix="")
            problems.append(_Problem(place, "", f"{value}: is not a flag; write --section.key VALUE"))
        elif name != "config" and name not in KEYS:
            problems.append(_Problem(place, name, f"there is no such key{_nearest_key(name)}"))
        elif value is None:
            problems.append(_Problem(place, name, f"has no value; write --{name} VALUE"))
        elif name == "config":
            file = value
        else:
            settings[name] = _Setting(_flag_value(value, wanted=kind(KEYS[name])), place)
    return file, settings


def _flag_value(text: str, *, wanted: Kind) -> Any:
    if text == "null":
        return None
    if wanted in ("text", "choice") or (wanted == "list" and not text.startswith("[")):
        return text
    try:
        return _value(yaml.compose(text, Loader=yaml.SafeLoader), wanted=wanted)
    except yaml.YAMLError:
        return text


def _read_file(name: str, problems: list[_Problem]) -> tuple[dict[str, _Setting], dict[str, _Place]]:
    """The file's settings by dotted key, and the place of each section: its line, else the file."""
    try:
        path = find(name, among="configs/*.yaml")
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except UserError as error:
        problems.append(_Problem(_flag(-1), "config", str(error)))
        return {}, {}
    except (OSError, UnicodeDecodeError) as error:
        problems.append(_Problem(_flag(-1), "config", f"{name} cannot be read: {error}"))
        return {}, {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = _line(path, mark.line + 1 if mark else 1)
        problems.append(_Problem(place, "", f"this is not YAML: {getattr(error, 'problem', None) or error}"))
        return {}, {}
    settings = {}
    sections = dict.fromkeys(SECTIONS, _Place(0, 0, f"{path}: "))
    if root is None:
        return settings, sections
    for section, body, place in _entries(root, path, "", problems):
        if section not in SECTIONS:
            problems.append(_Problem(place, section, _unknown_section(section, body)))
            continue
        sections[section] = place
        for key, node, key_place in _entries(body, path, section, problems):
            dotted = f"{section}.{key}"
            if dotted in KEYS:
                settings[dotted] = _Setting(_value(node, wanted=kind(KEYS[dotted])), key_place)
            else:
                problems.append(_Problem(key_place, dotted, f"there is no such key{_nearest_key(dotted)}"))
    return settings, sections


def _line(path: Path, line: int) -> _Place:
    return _Place(0, line, f"{path}:{line}: ")


def _entries(
    node: yaml.Node, path: Path, section: str, problems: list[_Problem]
) -> Iterator[tuple[str, yaml.Node, _Place]]:
    """Name, value and place of each entry of a mapping that may be left empty; duplicates are problems."""
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return
    if not isinstance(node, yaml.MappingNode):
        what = (
            "a section holds `key: value` lines" if section else "a config holds sections, each with `key: value` lines"
        )
        problems.append(_Problem(_line(path, node.start_mark.line + 1), section, what))
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = key.value if isinstance(key, yaml.ScalarNode) else "?", key.start_mark.line + 1
        if name in lines:
            dotted = f"{section}.{name}" if section else name
            problems.append(_Problem(_line(path, line), dotted, f"stands in line {lines[name]} already; remove one"))
        else:
            lines[name] = line
            yield name, value, _line(path, line)


def _unknown_section(name: str, body: yaml.Node) -> str:
    if name in KEYS:
        section, key = name.split(".")
        return f"files have sections; write `{key}:` on a line of its own below `{section}:`"
    if isinstance(body, yaml.MappingNode):
        return f"there is no such section{nearest(name, SECTIONS)}"
    return f"there is no such section, and keys stand in sections{_nearest_key(name)}"


def _value(node: yaml.Node | None, *, wanted: Kind) -> Any:
    """A node as plain data; what is not of the wanted type stays text or a node, for pydantic to refuse."""
    if node is None or node.tag.endswith(":null"):
        return None
    if isinstance(node, yaml.SequenceNode) and wanted == "list":
        return [_value(item, wanted="text") for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return node
    try:
        if node.tag.rpartition(":")[2] in _TAGS.get(wanted, ()):
            return yaml.constructor.SafeConstructor().construct_object(node)
        return float(node.value) if wanted == "integer" else node.value  # YAML 1.1 takes `5e9` for text
    except ValueError:
        return node.value


def _plain(error: Mapping[str, Any]) -> str:
    """A pydantic error in words for someone who has never heard of pydantic."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    value = error["input"]
    if value is None:
        return "has no value; give it one or leave it out"
    kinds = {
        "string_type": "should be text",
        "string_too_short": "should not be empty",
        "tuple_type": "should be a list such as [a, b]",
        "bool_type": "should be true or false",
        "bool_parsing": "should be true or false",
        "literal_error": f"should be {error.get('ctx', {}).get('expected')}",
    }
    told = kinds.get(error["type"]) or error["msg"].removeprefix("Input ").split(",")[0]
    given = {yaml.SequenceNode: "a list", yaml.MappingNode: "a section"}.get(type(value), repr(value))
    return f"{told}, not {given}"
