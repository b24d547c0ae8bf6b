"""Find checkpoints and inspect them without loading weights."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lamda.config.errors import UserError
from lamda.config.loading import DEPRECATED
from lamda.console import NONE, duration, size_of
from lamda.durable import read_regular
from lamda.storage import manifest
from lamda.storage.reading import UnreadableError
from lamda.storage.run_directory import RunDirectory, modified_at

NAME = "CHECKPOINT_OR_RUN"
NAME_HELP = "a checkpoint folder, a run directory (its newest checkpoint), or RUN@STEP"
SET_ASIDE = {".damaged": "set aside when the run resumed", ".spoilt": "the run rolled back from it"}
"""The meaning of a checkpoint's suffix."""
PRUNED = "pruned meanwhile"
"""The problem of a checkpoint that its run deleted during the inspection."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint by its manifest and file sizes; nothing is hashed.

    framework: that wrote it. zero_stage: of DeepSpeed. problem: a missing file, a wrong size, an unreadable manifest.
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
        """`complete`, or the problem."""
        if self.problem is None:
            return "complete"
        return f"{'spoilt' if self.path.suffix == '.spoilt' else 'damaged'}, {self.problem}"

    @property
    def cells(self) -> tuple[str, ...]:
        """Name, size, ranks, ZeRO stage or framework, age and state, for people."""
        stage = self.zero_stage if self.framework == "deepspeed" else self.framework
        ranks, stage = (NONE if value is None else str(value) for value in (self.ranks, stage))
        return self.path.name, size_of(self.bytes), ranks, stage, duration(self.age_seconds), self.state


def find_checkpoint(name: str) -> Path:
    """The checkpoint that `name` means (NAME_HELP). Raises UserError if there is none."""
    found = manifest.find(Path(name))
    if found is None:
        raise UserError(f"{name}: no checkpoint here; give {NAME_HELP}")
    return found


def find_checkpoints(name: str) -> list[Path]:
    """All complete checkpoints of a run, oldest first, or the one that `name` means. Raises UserError if none."""
    return manifest.complete(RunDirectory(Path(name)).checkpoints) or [find_checkpoint(name)]


def all_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run and those set aside, oldest first."""
    folder = RunDirectory(run).checkpoints
    return sorted([*manifest.complete(folder), *manifest.set_aside(folder)])


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Read manifest.json and compare the files with it by name and size."""
    content: dict[str, Any] = {}
    size = 0
    try:
        content = read_manifest(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        problems = (_size_problem(path / name, name, entry["size"]) for name, entry in content["files"].items())
        problem = next(filter(None, problems), None)
    except (UserError, OSError) as error:
        problem = str(error) if path.exists() else PRUNED
    modified = modified_at(path / manifest.MANIFEST)
    named = re.match(r"step-(\d+)", path.name)
    return CheckpointInfo(
        path=path,
        step=content.get("step", int(named[1]) if named else None),
        bytes=size,
        ranks=content.get("ranks"),
        framework=manifest.framework_of(content) if content else None,
        zero_stage=content.get("zero_stage"),
        age_seconds=None if modified is None else round(time.time() - modified, 1),
        problem=SET_ASIDE.get(path.suffix, problem),
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint, without checking its hash. Raises UserError if it is invalid."""
    try:
        content = manifest.read(path)
        sum(entry["size"] for entry in content["files"].values())
    except (OSError, UnreadableError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / manifest.MANIFEST} cannot be read ({error})") from error
    return content


def _size_problem(file: Path, name: str, size: int) -> str | None:
    if not file.is_file():
        return f"{name} is missing"
    found = file.stat().st_size
    return None if found == size else f"{name} has {found} bytes instead of {size}"


def read_config(path: Path) -> dict[str, Any]:
    """The values of a config.yaml of any version, by `section.key`. Raises UserError."""
    try:
        sections = yaml.safe_load(read_regular(path))
        stages = {"stages": sections.pop("stages")} if "stages" in sections else {}
        values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        values |= stages
        return {DEPRECATED.get(key, key): value for key, value in values.items()}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
