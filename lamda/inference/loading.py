"""A saved model from its checkpoint; nothing of training is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.data.tokenizer import Tokenizer
from lamda.inference.int8 import to_int8
from lamda.model import LaMDA

WEIGHTS = "model.safetensors"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there. Raises UserError where there is none."""
    if (path / WEIGHTS).is_file():
        return path
    latest = path / "checkpoints" / "LATEST"
    newest = latest.parent / latest.read_text("utf-8").strip() if latest.is_file() else path
    if not (newest / WEIGHTS).is_file():
        raise UserError(
            f"{path}: neither a checkpoint nor a run that has one; `lamda runs DIR` lists the runs below a folder"
        )
    return newest


def load_model(path: Path, config: ModelConfig) -> LaMDA:
    """The model of a checkpoint, in the precision of its weights, ready to evaluate."""
    weights = load_file(path / WEIGHTS)
    model = LaMDA(config).to(next(iter(weights.values())).dtype)
    model.load_weights(weights)
    return model.eval()


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to generate.

    path: of the checkpoint. config: the run's.
    """

    path: Path
    config: Config
    model: LaMDA
    tokenizer: Tokenizer


def load_run(path: Path, *, int8: bool = False) -> LoadedModel:
    """The checkpoint at `path`, or the newest of the run there, on the GPU where there is one.

    int8: matrices in 8 bits (`lamda.inference.int8`). Raises UserError where something is missing.
    """
    checkpoint = find_checkpoint(path)
    config = load_config(["--config", str(checkpoint / "config.yaml")])
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.model")
    model = load_model(checkpoint, config.model).requires_grad_(requires_grad=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(checkpoint, config, (to_int8(model) if int8 else model).to(device), tokenizer)
