"""Checkpoints as files: where they are, and what can be told without loading their weights."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lamda.config.errors import UserError
from lamda.config.loading import DEPRECATED
from lamda.durable import read_regular
from lamda.runs.reading import changed_at
from lamda.storage import manifest
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import RunDirectory

NAME = "CHECKPOINT_OR_RUN"
NAME_HELP = "a checkpoint's folder, a run's (its newest checkpoint), or RUN@STEP"
SET_ASIDE = {".damaged": "was set aside when the run went on", ".spoilt": "the run rolled back from it"}
"""What a checkpoint's suffix tells of it."""
PRUNED = "pruned meanwhile"
"""Said of a checkpoint that a running run deleted while it was looked at."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint at a glance. problem: what its files' names and sizes show to be wrong; nothing is hashed.

    framework, zero_stage: what trained it, and where that is DeepSpeed, its stage.
    """

    path: Path
    step: int | None
    bytes: int
    ranks: int | None
    framework: str | None
    zero_stage: int | None
    age_seconds: float | None
    problem: str | None

    @property
    def state(self) -> str:
        """`complete`, or what is wrong."""
        if self.problem is None:
            return "complete"
        return f"{'spoilt' if self.path.suffix == '.spoilt' else 'damaged'}, {self.problem}"


def find_checkpoint(name: str) -> Path:
    """The one that `name` means (see NAME_HELP). Raises UserError where there is none."""
    found = manifest.find(Path(name))
    if found is None:
        raise UserError(f"{name}: no checkpoint is here; give {NAME_HELP}")
    return found


def find_checkpoints(name: str) -> list[Path]:
    """All complete ones of a run, oldest first, or the one that `name` means. Raises UserError where there is none."""
    return manifest.complete(RunDirectory(Path(name)).checkpoints) or [find_checkpoint(name)]


def all_checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints and those that were set aside, oldest first."""
    folder = RunDirectory(run).checkpoints
    return sorted([*manifest.complete(folder), *manifest.set_aside(folder)])


def glance(path: Path) -> Saved:
    """What manifest.json and the folder tell."""
    content: dict[str, Any] = {}
    size = 0
    try:
        content = read_manifest(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        wrong = (_missing(path, name, entry["size"]) for name, entry in content["files"].items())
        problem = next(filter(None, wrong), None)
    except (UserError, OSError) as error:
        problem = str(error) if path.exists() else PRUNED
    changed = changed_at(path / manifest.MANIFEST)
    named = re.match(r"step-(\d+)", path.name)
    return Saved(
        path=path,
        step=content.get("step", int(named[1]) if named else None),
        bytes=size,
        ranks=content.get("ranks"),
        framework=manifest.framework_of(content) if content else None,
        zero_stage=content.get("zero_stage"),
        age_seconds=None if changed is None else round(time.time() - changed, 1),
        problem=SET_ASIDE.get(path.suffix, problem),
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint, its hash not checked. Raises UserError where it is none."""
    try:
        content = manifest.read(path)
        sum(entry["size"] for entry in content["files"].values())
    except (OSError, UnreadableError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / manifest.MANIFEST} cannot be read ({error})") from error
    return content


def _missing(path: Path, name: str, size: int) -> str | None:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    found = file.stat().st_size
    return None if found == size else f"{name} has {found} bytes instead of {size}"


def read_config(path: Path) -> dict[str, Any]:
    """The values of a config.yaml of any version by current `section.key`. Raises UserError."""
    try:
        sections = yaml.safe_load(read_regular(path))
        values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        return {DEPRECATED.get(key, key): value for key, value in values.items()}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
