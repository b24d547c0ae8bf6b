"""Where a run begins: its newest valid checkpoint, a named one, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.distributed import World, on_main
from lamda.durable import Progress
from lamda.training import manifest
from lamda.training.rollback import set_spoilt_aside
from lamda.training.run_directory import RunDirectory
from lamda.training.state import RunState


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from (or None), and the state in it."""

    path: Path | None
    state: RunState

    def check_data(self, current: dict[str, Any]) -> RunState:
        """The state to begin with, carrying `current` as its fingerprint.

        Raises UserError, naming what differs, where the samples would not be those of the checkpoint.
        """
        saved = self.state.fingerprint
        if saved and saved != current:
            names = [name for name in {**current, **saved} if saved.get(name) != current.get(name)]
            told = "; ".join(f"{name} was {_short(saved.get(name))}, is {_short(current.get(name))}" for name in names)
            raise UserError(
                f"{self.path}: the data would not be the checkpoint's: {told}. Set these back, or start another "
                "run.dir from the weights alone (model.weights)"
            )
        return replace(self.state, fingerprint=current)


def choose_start(
    config: Config, directory: RunDirectory, world: World, *, framework: str, progress: Progress = lambda: None
) -> Start:
    """What `checkpoint.resume` asks for, verified. Every rank calls it. Raises UserError.

    framework: the name of the one that is to go on from it. progress: called while files are hashed.
    """
    wish = config.checkpoint.resume
    on_main(world, lambda: _check_wish(config, directory))
    if wish == "never":
        return Start(None, RunState())
    if wish in ("auto", "required"):
        on_main(world, lambda: set_spoilt_aside(directory))
        path = manifest.find_valid(directory.checkpoints, world=world, progress=progress)
    else:
        path = Path(wish)
        problem = manifest.verify(path, world=world, progress=progress)
        if problem is not None:
            raise UserError(f"checkpoint.resume {wish}: {problem}")
        on_main(world, lambda: _inherit_windows(path, directory))
    if path is None:
        return Start(None, RunState())

    def check() -> None:
        _check_framework(framework, path)
        _check_model(config, path)
        _check_optimizer(config, path)
        _check_adapters(config, path)

    on_main(world, check)
    return Start(path, _with_noted_windows(RunState.read(path / "run_state.json"), directory))


def settings_of(path: Path) -> Config | None:
    """The configuration that a checkpoint was made with; None where this version does not take it any more."""
    try:
        return load_config(["--config", str(path / "config.yaml")])
    except UserError:
        return None


def _check_wish(config: Config, directory: RunDirectory) -> None:
    wish, here = config.checkpoint.resume, manifest.complete(directory.checkpoints)
    if wish == "never" and directory.holds_a_run:
        raise UserError(f"checkpoint.resume never: {directory.path} already holds a run; choose another run.dir")
    if wish == "required" and not here:
        raise UserError(f"checkpoint.resume required: {directory.checkpoints} holds no complete checkpoint")
    if wish in ("auto", "required", "never"):
        return
    if not Path(wish).is_dir():
        raise UserError(f"checkpoint.resume {wish}: no such checkpoint (nor one of auto, required, never)")
    newer = [path.name for path in here if path.name > Path(wish).name]
    if newer:
        raise UserError(
            f"checkpoint.resume {wish}: {directory.path} holds newer checkpoints ({newer[-1]}), which going on from "
            "here would overwrite; choose another run.dir"
        )


def _check_framework(name: str, path: Path) -> None:
    there = manifest.framework_of(manifest.read(path))
    if there != name:
        raise UserError(
            f"{path} holds the state of {there}, which {name} cannot go on from. Go on with {there}, or start from the "
            f"weights alone: model.weights {path / 'model.safetensors'} and another run.dir"
        )


def _check_model(config: Config, path: Path) -> None:
    wanted = config.model.dimensions
    there = manifest.read(path)["model"]
    told = [
        f"{key} is {there.get(key)}, the configuration says {value}"
        for key, value in wanted.items()
        if there.get(key) != value
    ]
    if told:
        raise UserError(
            f"{path} is a checkpoint of another model: {'; '.join(told)}. Mend model.*, or choose another run.dir"
        )


def _check_optimizer(config: Config, path: Path) -> None:
    there = manifest.read(path).get("optimizer", "adamw")  # before there were others, none was named
    if there != config.train.optimizer:
        raise UserError(
            f"{path} holds the state of {there}, which train.optimizer {config.train.optimizer} cannot go on from. Set "
            f"train.optimizer {there}, or start from the weights alone: model.weights {path / 'model.safetensors'} "
            "and another run.dir"
        )


def _check_adapters(config: Config, path: Path) -> None:
    there = manifest.read(path).get("lora_rank", 0)  # before there were adapters, none was named
    if there != config.train.lora_rank:
        held = f"adapters of rank {there}" if there else "no adapters"
        raise UserError(
            f"{path} holds {held}, which train.lora_rank {config.train.lora_rank} cannot go on from. Set "
            f"train.lora_rank {there}, or start from the weights alone: model.weights {path / 'model.safetensors'} and "
            "another run.dir"
        )


def _with_noted_windows(state: RunState, directory: RunDirectory) -> RunState:
    """The state, jumping over what the run went back from after this checkpoint was written."""
    skipped = (*state.skipped, *(window for window in directory.skipped() if window not in state.skipped))
    return replace(state, skipped=skipped, rollbacks=max(state.rollbacks, directory.rollbacks))


def _inherit_windows(path: Path, directory: RunDirectory) -> None:
    """Skip what the run that `path` is a checkpoint of has noted since it was written."""
    folder = path.resolve().parent
    if folder.name == directory.checkpoints.name and folder.parent != directory.path.resolve():
        directory.inherit_skipped(RunDirectory(folder.parent))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
