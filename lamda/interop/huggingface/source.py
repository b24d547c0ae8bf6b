"""A checkpoint to export: its configuration, manifest, state and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.stages import Stage, plan_stages
from lamda.inference.loading import saved_config
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState


@dataclass(frozen=True)
class ExportSource:
    """A verified checkpoint. manifest and state: empty for a folder of weights only (`lamda import`).

    metrics: the rows of its run up to its step. stages: of its run.
    """

    path: Path
    config: Config
    manifest: dict[str, Any]
    state: RunState | None
    metrics: list[dict[str, Any]]
    stages: Sequence[Stage] = ()

    @classmethod
    def of(cls, path: Path) -> ExportSource:
        """Raises UserError if the checkpoint is damaged, by its hashes."""
        if not (path / manifest.MANIFEST).exists():
            return cls(path, saved_config(path), {}, None, [])
        problem = manifest.problem_of(path)
        if problem:
            raise UserError(f"{path}: {problem}; `lamda checkpoint ls` shows the others")
        stages = plan_stages(load_config(["--config", str(manifest.named(path, "config.yaml"))]))
        content = manifest.read(path)
        state = manifest.read_state(path) if manifest.STATE in content["files"] else None
        rows = read_metrics(RunDirectory(path.absolute().parents[1]).metrics) if state else []
        rows = [row for row in rows if row["step"] <= content["step"]]
        return cls(path, saved_config(path), content, state, rows, stages)

    def newest(self, prefix: str) -> tuple[int, dict[str, float]] | None:
        """The step and values of the last row with keys of this prefix."""
        for row in reversed(self.metrics):
            found = {key: value for key, value in row.items() if key.startswith(prefix) and value is not None}
            if found:
                return row["step"], found
        return None
