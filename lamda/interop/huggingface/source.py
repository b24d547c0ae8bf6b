"""What a checkpoint tells of the model in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.inference.loading import saved_config
from lamda.storage import commit
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState


@dataclass(frozen=True)
class Source:
    """A verified checkpoint. manifest and state: nothing where it is a folder of weights alone (`lamda import`).

    metrics: the rows of its run up to its step.
    """

    path: Path
    config: Config
    manifest: dict[str, Any]
    state: RunState | None
    metrics: list[dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Source:
        """Raises UserError where the checkpoint is damaged, by its hashes."""
        if not (path / commit.MANIFEST).exists():
            return cls(path, saved_config(path), {}, None, [])
        problem = commit.problem_of(path)
        if problem:
            raise UserError(f"{path}: {problem}; `lamda checkpoint ls` shows the others")
        config = load_config(["--config", str(commit.named(path, "config.yaml"))])
        content = commit.read(path)
        state = commit.read_state(path) if commit.STATE in content["files"] else None
        rows = read_metrics(RunDirectory(path.absolute().parents[1]).metrics) if state else []
        return cls(path, config, content, state, [row for row in rows if row["step"] <= content["step"]])

    def newest(self, prefix: str) -> tuple[int, dict[str, float]] | None:
        """The step and values of the last row that has keys of this prefix."""
        for row in reversed(self.metrics):
            found = {key: value for key, value in row.items() if key.startswith(prefix) and value is not None}
            if found:
                return row["step"], found
        return None
