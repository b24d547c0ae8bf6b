"""Weights & Biases as a mirror of metrics.jsonl: never the truth, never in the way."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

from lamda.config.schema import Config

log = logging.getLogger(__name__)


class WandbMirror:
    """One W&B run for the whole life of a run; whatever fails is said once, and the run goes on."""

    def __init__(self, config: Config, *, folder: Path, run_id: str | None, step: int) -> None:
        remembered = folder / "wandb" / "run-id"
        if run_id is None and remembered.exists():
            run_id = remembered.read_text("utf-8")
        self.run_id = run_id
        self._run: Any = None
        if config.wandb.mode == "disabled":
            return
        try:
            self._run = _init(config, folder=folder, run_id=run_id)
            self.run_id = self._run.id
            remembered.parent.mkdir(exist_ok=True)
            remembered.write_text(self.run_id, "utf-8")
        except Exception as error:
            log.warning("W&B is not used: %s; metrics.jsonl has everything", _first_line(error))
        self._done = step

    def log(self, row: dict[str, Any]) -> None:
        """Mirror a row; rows that W&B has seen before a restart are not sent twice."""
        if self._run is None or row["step"] <= self._done:
            return
        try:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
        except Exception as error:
            log.warning("W&B stopped: %s; metrics.jsonl goes on", _first_line(error))
            self._run = None

    def finish(self) -> None:
        """End the mirror; what could not be sent stays in RUN/wandb for `wandb sync`."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                log.warning("W&B did not finish: %s", _first_line(error))


def _init(config: Config, *, folder: Path, run_id: str | None) -> Any:
    import wandb

    mode = config.wandb.mode
    if mode == "online" and not _has_key():
        log.warning(
            "no W&B key (WANDB_API_KEY or `wandb login`): rows are kept in %s for `wandb sync`", folder / "wandb"
        )
        mode = "offline"
    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.wandb.name or folder.name,
        id=run_id or secrets.token_hex(4),
        resume="allow" if mode == "online" else None,
        dir=folder,
        mode=mode,
        config={**config.model_dump(mode="json"), "git_commit": _git_commit()},
        settings=wandb.Settings(console="off", silent=True, init_timeout=30, finish_timeout=60),
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def _git_commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
