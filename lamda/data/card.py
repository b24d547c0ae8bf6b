"""Dataset cards (data/*.yaml): the sources of a corpus, their licenses, and how records are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from lamda.config.errors import UserError, nearest
from lamda.config.resources import card_path
from lamda.config.schema import DataConfig
from lamda.config.values import AnyPatterns

OWN_FILES = "files"
"""The source of `data.files`."""


class _CardSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class HubDataset(_CardSection):
    """A dataset of the Hugging Face hub, pinned to a commit."""

    path: str
    revision: str = Field(description="a commit, so that the text cannot change during a run")
    split: str = "train"
    name: str | None = Field(None, description="configuration of the dataset, if it has several")


class Checksum(_CardSection):
    """Expected size and hash of a stored file."""

    size: int = Field(ge=0, description="bytes, as stored")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the stored bytes")


class Source(_CardSection):
    """One source of text.

    It has either `files` (globs, paths, `hf://` or `http(s)://` addresses) or `dataset`. `text` and `domain` are dotted
    paths into a record; without `domain`, the domain is the name of the source. `standard_library` names a folder that
    is filled, if missing, with the sources of Python's standard library. Keys of `checksums` are file names, with as
    much of their path as makes them unique.
    """

    name: str
    license: str = Field(validation_alias=AliasChoices("license", "licence"))
    files: AnyPatterns = ()
    dataset: HubDataset | None = None
    standard_library: str | None = None
    text: str = "text"
    domain: str | None = None
    checksums: dict[str, Checksum] = Field({}, description="sizes and sha256 of stored files, where known")
    weight: float = Field(1.0, gt=0, description="share of the training tokens, relative to the other sources")

    @field_validator("dataset")
    @classmethod
    def _one_origin(cls, dataset: HubDataset | None, info: ValidationInfo) -> HubDataset | None:
        if bool(info.data.get("files")) == (dataset is not None):
            raise ValueError("a source has either files or a dataset")
        return dataset


class Change(_CardSection):
    """New weights from a sample on; sources that are not named keep theirs."""

    at_sample: int = Field(gt=0)
    weights: dict[str, float]


class Card(_CardSection):
    """A corpus: training sources, validation text, and changes of the weights during training."""

    name: str
    description: str
    homepage: str | None = None
    sources: tuple[Source, ...] = Field(min_length=1)
    validation: tuple[Source, ...] = ()
    domains: tuple[str, ...] = Field((), description="names that the domain field holds; default: those found first")
    changes: tuple[Change, ...] = ()

    @field_validator("sources")
    @classmethod
    def _named_once(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}, and weights go by name; give each its own")
        return sources

    @field_validator("changes")
    @classmethod
    def _in_order(cls, changes: tuple[Change, ...], info: ValidationInfo) -> tuple[Change, ...]:
        known = {source.name for source in info.data.get("sources", ())}
        unknown = {name for change in changes for name in change.weights} - known
        if unknown:
            raise ValueError(f"no source is called {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
        if any(weight <= 0 for change in changes for weight in change.weights.values()):
            raise ValueError("a weight is greater than 0")
        samples = [change.at_sample for change in changes]
        if samples != sorted(set(samples)):
            raise ValueError("changes come in rising order of at_sample")
        return changes

    @property
    def stages(self) -> list[tuple[int, dict[str, float]]]:
        """(first sample, weight of each source) of every part of the run; the first begins at 0."""
        weights = {source.name: source.weight for source in self.sources}
        stages = [(0, weights)]
        for change in self.changes:
            weights = weights | change.weights
            stages.append((change.at_sample, weights))
        return stages


def load_card(config: DataConfig) -> Card:
    """The card of a run, with the files of the configuration if it names any.

    `data.files` and `data.eval_files` replace the files of the card; only the text and domain rules of its first source
    apply to them. `data.files` also removes the validation text of the card, which is not held out of those files.
    Raises UserError for an unreadable card.
    """
    path = card_path(config.corpus)
    card = _read(path)
    rules = card.sources[0].model_dump(include={"text", "domain"}) | {"license": "not stated"}
    if config.files is not None:
        own = {"name": "data.files", "description": "files that the run named itself", "homepage": None}
        sources = (Source(name=OWN_FILES, files=config.files, **rules),)
        card = card.model_copy(update={"sources": sources, "validation": (), "changes": (), "domains": (), **own})
    if config.eval_files is not None:
        card = card.model_copy(update={"validation": (Source(name="eval_files", files=config.eval_files, **rules),)})
    return card


def _read(path: Path) -> Card:
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
        card = {} if root is None else yaml.constructor.SafeConstructor().construct_document(root)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, for example
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    problems = [f"{path}:{line}: {name}: appears twice; remove one" for name, line in _repeated(root)]
    try:
        if not problems:
            return Card.model_validate(card)
    except ValidationError as error:
        problems = [_message(path, root, each) for each in error.errors()]
    raise UserError("\n".join(problems))


def _repeated(root: yaml.Node | None) -> list[tuple[str, int]]:
    """Keys that appear twice in a mapping, with their lines; YAML would silently take the last."""
    found: list[tuple[str, int]] = []
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an anchor can lead back
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            left += [value for _, value in node.value]
            names = [key.value for key, _ in node.value]
            found += [
                (name, node.value[place][0].start_mark.line + 1)
                for place, name in enumerate(names)
                if name in names[:place] and name != "<<"
            ]
    return sorted(found, key=lambda each: each[1])


def _message(path: Path, root: yaml.Node | None, error: Mapping[str, Any]) -> str:
    """A pydantic error with its line, and the nearest key for an unknown one."""
    place = error["loc"]
    name = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        problem = f"there is no such key{nearest(str(place[-1]), _part_at(place[:-1]).model_fields)}"
    elif error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
    else:
        problem = error["msg"] if place else "a card holds `key: value` lines"
    return f"{path}:{_line_of(root, place)}: {f'{name}: ' if name else ''}{problem}"


def _part_at(place: tuple[str | int, ...]) -> type[_CardSection]:
    """The section of a card that a location belongs to."""
    parts: dict[str, type[_CardSection]] = {
        "sources": Source,
        "validation": Source,
        "changes": Change,
        "dataset": HubDataset,
    }
    if len(place) > 1 and place[-2] == "checksums":
        return Checksum
    return next((parts[name] for name in reversed(place) if isinstance(name, str) and name in parts), Card)


def _line_of(node: yaml.Node | None, place: tuple[str | int, ...]) -> int:
    """The line of a location in a card, or of its nearest existing parent."""
    line = 1 if node is None else node.start_mark.line + 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
