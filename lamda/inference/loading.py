"""Loading a model from a checkpoint for inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.config.stages import plan_stages, stage_at, with_rows_of
from lamda.data.tokenizer import Tokenizer
from lamda.inference.int8 import to_int8
from lamda.model import LaMDA
from lamda.storage import manifest

WEIGHTS = "model.safetensors"
READ = ("config.yaml", "tokenizer.model", WEIGHTS)
"""The files of a checkpoint that inference reads."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: its folder, RUN (the newest), RUN@STEP, or a folder with weights only.

    The files that inference reads are verified by its manifest. Raises UserError if there is none or it is damaged.
    """
    found = manifest.find(path)
    if found is None and (path / WEIGHTS).is_file():
        return path
    if found is None:
        raise UserError(
            f"{path}: neither a checkpoint nor a run with one; `lamda list DIR` lists the runs below a folder"
        )
    there = [name for name in READ if (found / name).exists()]  # an export has no config.yaml
    problem = manifest.problem_of(found, only=READ if manifest.is_checkpoint_name(found.name) else there)
    if problem is not None:
        raise UserError(
            f"{found}: {problem}; `lamda checkpoint verify` checks the others, and RUN@STEP takes one of them"
        )
    return found


def saved_config(checkpoint: Path, *overrides: str) -> Config:
    """The configuration in a checkpoint, with `overrides` as on a command line, and the rows of its stage.

    Raises UserError if there is none.
    """
    file = checkpoint / "config.yaml"
    if not file.exists():
        is_export = (checkpoint / "config.json").exists()
        remedy = f"`lamda import {checkpoint} --to DIR` brings an export back" if is_export else "give a checkpoint"
        raise UserError(f"{checkpoint}: there is no config.yaml; {remedy}")
    config = load_config(["--config", str(file), *overrides])
    step = manifest.step_in(checkpoint) if config.stages else None
    return config if step is None else with_rows_of(config, stage_at(plan_stages(config), step - 1).config)


def deleted(checkpoint: Path) -> str:
    """An addition to messages about a checkpoint that no longer exists."""
    gone = "; the running job has deleted it as an old checkpoint: try again, or increase checkpoint.keep"
    return "" if checkpoint.exists() else gone


def load_model(path: Path, config: ModelConfig) -> LaMDA:
    """The model of a checkpoint, in its weights' precision and in eval mode. Raises UserError if it cannot be read."""
    try:
        weights = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS}: cannot be read ({error}){deleted(path)}") from error
    model = LaMDA(config).to(next(iter(weights.values())).dtype)
    model.load_weights(weights)
    return model.eval()


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint. config: of its run."""

    path: Path
    config: Config
    model: LaMDA
    tokenizer: Tokenizer


def load_run(path: Path, *, int8: bool = False) -> LoadedModel:
    """Load the checkpoint at `path`, or the newest of a run, on the GPU if there is one.

    int8: quantize matrices (`lamda.inference.int8`). Raises UserError if something is missing.
    """
    checkpoint = find_checkpoint(path)
    config = saved_config(checkpoint)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.model")
    model = load_model(checkpoint, config.model).requires_grad_(requires_grad=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(checkpoint, config, (to_int8(model) if int8 else model).to(device), tokenizer)
