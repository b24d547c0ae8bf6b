"""Corpus cards: where text comes from, under which licence, and how a record is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

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


class Source(_Part):
    """One origin of text.

    `files` (globs, paths, `hf://` or `http(s)://` addresses) or `dataset`, never both. `text` and
    `domain` are dotted paths into a record; without a domain the source's name stands for it.
    `standard_library` names a folder that is filled, where it is not there, with the interpreter's
    own sources: text that every machine has.
    """

    name: str
    licence: str
    files: Patterns = ()
    dataset: HubDataset | None = None
    standard_library: str | None = None
    text: str = "text"
    domain: str | None = None
    weight: float = Field(1.0, gt=0, description="share of the training tokens, relative to the other sources")

    @field_validator("dataset")
    @classmethod
    def _one_origin(cls, dataset: HubDataset | None, info: Any) -> HubDataset | None:
        if bool(info.data.get("files")) == (dataset is not None):
            raise ValueError("a source has either files or a dataset")
        return dataset


class Card(_Part):
    """A corpus: its training sources and its validation text."""

    name: str
    description: str
    homepage: str | None = None
    sources: tuple[Source, ...] = Field(min_length=1)
    validation: tuple[Source, ...] = ()


def load_card(config: DataConfig) -> Card:
    """The card of a run, its files replaced where the configuration says so.

    `data.files` and `data.eval_files` stand in for the card's files and keep the text and domain
    rules of its first source. Raises UserError for an unreadable card.
    """
    path = card_path(config.corpus)
    card = _read(path)
    rules = card.sources[0].model_dump(include={"licence", "text", "domain"})
    if config.files is not None:
        card = card.model_copy(update={"sources": (Source(name="files", files=config.files, **rules),)})
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
