"""Corpus cards: where text comes from, under which licence, and how a record is read."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from lamda.config.errors import UserError
from lamda.config.resources import card_path
from lamda.config.schema import DataConfig, Patterns


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class HubDataset(_Part):
    """A data set of the Hugging Face hub, pinned."""

    path: str
    revision: str = Field(description="a commit, so that the text cannot change under a run")
    split: str = "train"
    name: str | None = Field(None, description="the data set's configuration, where it has several")


class Checksum(_Part):
    """What a stored file must be."""

    size: int = Field(ge=0, description="bytes, as stored")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the stored bytes")


class Source(_Part):
    """One origin of text.

    `files` (globs, paths, `hf://` or `http(s)://` addresses) or `dataset`, never both. `text` and
    `domain` are dotted paths into a record; without a domain the source's name stands for it.
    `standard_library` names a folder that is filled, where it is not there, with the interpreter's
    own sources: text that every machine has. `checksums` are by file name, with as much of the path
    before it as tells it from others.
    """

    name: str
    licence: str
    files: Patterns = ()
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


class Change(_Part):
    """Other weights from a sample on; sources that are not named keep theirs."""

    at_sample: int = Field(gt=0)
    weights: dict[str, float]


class Card(_Part):
    """A corpus: its training sources, its validation text, and weights that change along the way."""

    name: str
    description: str
    homepage: str | None = None
    sources: tuple[Source, ...] = Field(min_length=1)
    validation: tuple[Source, ...] = ()
    domains: tuple[str, ...] = Field((), description="names that the domain field holds; default: those found first")
    changes: tuple[Change, ...] = ()

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
    """The card of a run, its files replaced where the configuration says so.

    `data.files` and `data.eval_files` stand in for the card's files and keep the text and domain
    rules of its first source. Raises UserError for an unreadable card.
    """
    path = card_path(config.corpus)
    card = _read(path)
    rules = card.sources[0].model_dump(include={"licence", "text", "domain"})
    if config.files is not None:
        replaced = (Source(name="files", files=config.files, **rules),)
        card = card.model_copy(update={"sources": replaced, "changes": (), "domains": ()})
    if config.eval_files is not None:
        card = card.model_copy(update={"validation": (Source(name="eval_files", files=config.eval_files, **rules),)})
    return card


def _read(path: Path) -> Card:
    try:
        return Card.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError("\n".join(lines)) from error
