"""A YAML file of sections, read against a schema: settings with their places, and a list of all errors.

The file is read as YAML nodes, so that the line of each key is known; pydantic checks the merged values, and each of
its errors is reported at the line or flag that it came from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lamda.config.errors import UserError, nearest
from lamda.config.resources import find
from lamda.config.values import Section

Kind = Literal["integer", "number", "boolean", "text", "choice", "list"]
Whole = TypeVar("Whole", bound=Section)

# YAML's idea of a value counts only where the field wants that type: a run may be called `1e3` or `off`,
# and `steps: yes` is not one step.
_TAGS = {"integer": ("int", "float"), "number": ("int", "float"), "boolean": ("bool",)}

_YAML_1_1 = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")
"""Numbers in base 8 or 60 of YAML 1.1: here `010` is ten, and `1:30` is no number."""


class ConfigError(UserError):
    """All problems of a configuration, one line each."""


class Place(NamedTuple):
    """Where a value came from; places sort as a reader meets them, the file before the flags."""

    source: Literal[0, 1]
    position: int
    prefix: str


class Setting(NamedTuple):
    """A value as it was written. old_name: the deprecated name it was written under."""

    value: Any
    place: Place
    old_name: str | None = None


class Problem(NamedTuple):
    """Something that is wrong, and where."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.place.prefix}{self.key}: {self.text}" if self.key else f"{self.place.prefix}{self.text}"


class Contents(NamedTuple):
    """A file's settings by dotted key, and the place of each section: its line, else the file.

    items: of sections that are lists. The place of item 0's `train.lr` in the list `stages` is `stages.0.train.lr`.
    """

    settings: dict[str, Setting]
    sections: dict[str, Place]
    items: dict[str, list[dict[str, Any]]]


class Schema(Generic[Whole]):
    """A model whose fields are sections of keys.

    flag: names the file on the command line. among: glob of the files that come with the package. removed: keys of
    earlier versions that files may still hold. deprecated: earlier names of keys.
    """

    def __init__(
        self,
        model: type[Whole],
        *,
        flag: str,
        among: str,
        removed: frozenset[str] = frozenset(),
        deprecated: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model, self.flag, self.among = model, flag, among
        self.removed, self.deprecated = removed, deprecated
        self.sections: Mapping[str, type[Section]] = {
            name: cast("type[Section]", field.annotation)
            for name, field in model.model_fields.items()
            if get_origin(field.annotation) is not tuple
        }
        self.lists: Mapping[str, type[Section]] = {
            name: get_args(field.annotation)[0]
            for name, field in model.model_fields.items()
            if get_origin(field.annotation) is tuple
        }
        self.keys: Mapping[str, FieldInfo] = {
            f"{name}.{key}": field
            for name, section in self.sections.items()
            for key, field in section.model_fields.items()
        }

    def renamed(self, name: str) -> tuple[str, str | None]:
        """The current name of a key, and `name` where that is a deprecated one."""
        return (self.deprecated[name], name) if name in self.deprecated else (name, None)

    def given_twice(self, key: str) -> str:
        """The problem of a key that is given under its current and its deprecated name."""
        old_name = next(old for old, new in self.deprecated.items() if new == key)
        return f"{old_name} is now {key}, and both are given; remove {old_name}"

    def nearest_key(self, name: str) -> str:
        """`"; did you mean 'train.lr'?"`: the key whose name, last part or description is most like `name`."""
        section, _, last = name.rpartition(".")

        def likeness(key: str) -> tuple[float, float]:
            of_section, of_last = key.split(".")
            described = _alike(last.replace("_", " "), (self.keys[key].description or "").partition(";")[0])
            whole = 0.0 if section else _alike(name, key)
            return max(_alike(last, of_last), described, whole), _alike(section, of_section)

        best = max(self.keys, key=likeness)
        return f"; did you mean {best!r}?" if likeness(best)[0] >= 0.6 else ""

    def read(self, name: str, problems: list[Problem]) -> Contents:
        """The settings of a file; its problems are added to `problems`."""
        reading = _Reading(self, name, problems)
        return Contents(reading.settings, reading.sections, reading.items)

    def build(
        self, contents: Contents, problems: list[Problem], *, elsewhere: tuple[Place, str] | None = None
    ) -> Whole:
        """The checked model. Raises `ConfigError` with one line per problem, including those found before.

        elsewhere: place of a missing key that neither file nor flags name, and a remark for its message.
        """
        values: dict[str, Any] = {section: {} for section in self.sections} | contents.items
        for name, setting in contents.settings.items():
            section, key = name.split(".")
            values[section][key] = setting.value
        whole = None
        try:
            whole = self.model.model_validate(values)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                section, key, *item = map(str, each["loc"])
                name = f"{section}.{key}"
                written = contents.settings.get(name)
                place = written.place if written else contents.sections.get(section)
                if section in self.lists:
                    place = contents.sections.get(".".join([name, *item]), place)
                    name, item = item_name(section, int(key), ".".join(item)), []
                numbers = [number for number in item if number.isdigit()]  # the others name a member of a union
                text = " ".join([f"item {int(number) + 1}" for number in numbers] + [in_plain_words(each)])
                if place:
                    problems.append(Problem(place, name, text))
                elif elsewhere:
                    problems.append(Problem(elsewhere[0], name, f"{text} ({elsewhere[1]})"))
        if problems or whole is None:
            raise ConfigError("\n".join(map(str, sorted(problems))))
        return whole


def item_name(name: str, index: int, key: str) -> str:
    """A key of an item of a list, for messages. index: from 0."""
    return f"{name}, item {index + 1}: {key}"


def flag_place(position: int) -> Place:
    """The place of the flag at a position of the command line."""
    return Place(1, position, "--")


def kind(field: FieldInfo) -> Kind:
    """The type of a key in plain words."""
    kinds: dict[Any, Kind] = {int: "integer", float: "number", bool: "boolean", str: "text"}
    kinds |= {Literal: "choice", tuple: "list"}
    return next(kinds[get_origin(member) or member] for member in _members(field.annotation))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of a key of kind `choice`."""
    return get_args(next(_members(field.annotation)))


def value_of(node: yaml.Node | None, *, wanted: Kind) -> Any:
    """A node as plain data; a value of another type stays text or a node, for pydantic to reject."""
    if node is None or node.tag.endswith(":null"):
        return None
    if isinstance(node, yaml.SequenceNode) and wanted == "list":
        return [value_of(item, wanted="text") for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        return node
    try:
        if node.tag.rpartition(":")[2] in _TAGS.get(wanted, ()) and not _YAML_1_1.fullmatch(node.value):
            return yaml.constructor.SafeConstructor().construct_object(node)
        return float(node.value) if wanted == "integer" else node.value  # YAML 1.1 takes `5e9` for text
    except ValueError:
        return node.value


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif annotation is not NoneType:
        yield annotation


def _alike(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


class _Reading:
    """Reads a file into settings and problems."""

    def __init__(self, schema: Schema[Any], name: str, problems: list[Problem]) -> None:
        self._schema, self._problems = schema, problems
        self.settings: dict[str, Setting] = {}
        self.sections: dict[str, Place] = {}
        self.items: dict[str, list[dict[str, Any]]] = {}
        at_flag = flag_place(-1), schema.flag
        try:
            self._path = find(name, among=schema.among)
            root = yaml.compose(self._path.read_text("utf-8"), Loader=yaml.SafeLoader)
        except UserError as error:
            problems.append(Problem(*at_flag, str(error)))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(*at_flag, f"{name} cannot be read: {error}"))
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            message = f"this is not YAML: {getattr(error, 'problem', None) or error}"
            problems.append(Problem(self._line(mark.line + 1 if mark else 1), "", message))
        else:
            self.sections = dict.fromkeys(schema.sections, Place(0, 0, f"{self._path}: "))
            if root is not None:
                self._read(root)

    def _read(self, root: yaml.Node) -> None:
        schema = self._schema
        for section, body, place in self._entries(root, ""):
            if section in schema.lists:
                self.sections[section] = place
                self.items[section] = [*self._read_items(section, body, place)]
                continue
            if section not in schema.sections:
                self._problems.append(Problem(place, section, self._unknown_section(section, body)))
                continue
            self.sections[section] = place
            for key, node, key_place in self._entries(body, section):
                name = f"{section}.{key}"
                dotted, old_name = schema.renamed(name)
                if dotted in self.settings:
                    self._problems.append(Problem(key_place, name, schema.given_twice(dotted)))
                elif dotted in schema.keys:
                    value = value_of(node, wanted=kind(schema.keys[dotted]))
                    self.settings[dotted] = Setting(value, key_place, old_name)
                elif dotted not in schema.removed:
                    message = f"there is no such key{schema.nearest_key(dotted)}"
                    self._problems.append(Problem(key_place, dotted, message))

    def _read_items(self, name: str, body: yaml.Node, place: Place) -> Iterator[dict[str, Any]]:
        """The items of a list, with values of the keys' own kinds; `section` and `section.key` of each have a place."""
        if body.tag.endswith(":null"):
            return
        if not isinstance(body, yaml.SequenceNode):
            self._problems.append(Problem(place, name, "should be a list of items that begin with `- `"))
            return
        for index, node in enumerate(body.value):
            item: dict[str, Any] = {}
            self.sections[f"{name}.{index}"] = self._line(node.start_mark.line + 1)
            for key, value, key_place in self._entries(node, name):
                self.sections[f"{name}.{index}.{key}"] = key_place
                if key not in self._schema.lists[name].model_fields:
                    among = self._schema.lists[name].model_fields
                    self._problems.append(
                        Problem(key_place, f"{name}: {key}", f"there is no such key{nearest(key, among)}")
                    )
                elif key not in self._schema.sections:
                    item[key] = value_of(value, wanted="text")
                else:
                    item[key] = {}
                    for inner, inner_value, inner_place in self._entries(value, key):
                        self.sections[f"{name}.{index}.{key}.{inner}"] = inner_place
                        field = self._schema.keys.get(f"{key}.{inner}")
                        item[key][inner] = value_of(inner_value, wanted=kind(field) if field else "text")
            yield item

    def _entries(self, node: yaml.Node, section: str) -> Iterator[tuple[str, yaml.Node, Place]]:
        """Name, value and place of each entry of a mapping that may be left empty; duplicates are problems."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return
        if not isinstance(node, yaml.MappingNode):
            holds = "a section holds" if section else f"a {self._schema.flag} holds sections, each with"
            place = self._line(node.start_mark.line + 1)
            self._problems.append(Problem(place, section, f"{holds} `key: value` lines"))
            return
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = key.value if isinstance(key, yaml.ScalarNode) else "?", key.start_mark.line + 1
            if name in lines:
                dotted = f"{section}.{name}" if section else name
                message = f"stands in line {lines[name]} already; remove one"
                self._problems.append(Problem(self._line(line), dotted, message))
            else:
                lines[name] = line
                yield name, value, self._line(line)

    def _line(self, line: int) -> Place:
        return Place(0, line, f"{self._path}:{line}: ")

    def _unknown_section(self, name: str, body: yaml.Node) -> str:
        schema = self._schema
        if name in schema.keys:
            section, key = name.split(".")
            return f"files have sections; write `{key}:` on a line of its own below `{section}:`"
        if isinstance(body, yaml.MappingNode):
            return f"there is no such section{nearest(name, schema.sections)}"
        return f"there is no such section, and keys stand in sections{schema.nearest_key(name)}"


def in_plain_words(error: Mapping[str, Any]) -> str:
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
    message = kinds.get(error["type"]) or error["msg"].removeprefix("Input ").split(",")[0]
    given = {yaml.SequenceNode: "a list", yaml.MappingNode: "a section"}.get(type(value), repr(value))
    return f"{message}, not {given}"
