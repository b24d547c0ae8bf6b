"""A saved model from its checkpoint; nothing of training is needed."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.model import LaMDA

WEIGHTS = "model.safetensors"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there. Raises UserError where there is none."""
    if (path / WEIGHTS).is_file():
        return path
    latest = path / "checkpoints" / "LATEST"
    newest = latest.parent / latest.read_text("utf-8").strip() if latest.is_file() else path
    if not (newest / WEIGHTS).is_file():
        raise UserError(f"{path}: neither a checkpoint nor a run that has one")
    return newest


def load_model(path: Path, config: ModelConfig) -> LaMDA:
    """The model of a checkpoint, in the precision of its weights, ready to evaluate."""
    weights = load_file(path / WEIGHTS)
    model = LaMDA(config).to(next(iter(weights.values())).dtype)
    model.load_weights(weights)
    return model.eval()
