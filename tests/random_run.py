"""A run directory with a model of random weights, as far as inference reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.data.tokenizer import CONTROL_SYMBOLS, Tokenizer
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.storage.commit import seal, sync_and_describe
from lamda.storage.manifest import MANIFEST


def write_run(path: Path, tokenizer_path: Path, *, dtype: torch.dtype = torch.float32, packing: str = "concat") -> Path:
    """The run, with one checkpoint of a tiny model, which hardly ever ends a text by itself."""
    vocabulary = Tokenizer.load(tokenizer_path).vocab_size
    shape = {"vocab_size": vocabulary, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 16, "d_ff": 64}
    config = Config.model_validate(
        {
            "run": {"dir": str(path)},
            "model": shape,
            "data": {"sequence_length": 256, "packing": packing},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
        }
    )
    checkpoint = path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    model = LaMDA(config.model).to(dtype)
    initialize_weights(model, seed=5)
    with torch.no_grad():
        model.embedding.weight[: len(CONTROL_SYMBOLS)] = 0
    save_file(
        {name: weight.contiguous() for name, weight in model.export_weights().items()}, checkpoint / "model.safetensors"
    )
    (checkpoint / "config.yaml").write_text(to_yaml(config), "utf-8")
    for folder in (checkpoint, path):
        shutil.copy(tokenizer_path, folder / "tokenizer.model")
    shutil.copy(checkpoint / "config.yaml", path / "config.yaml")
    seal_checkpoint(checkpoint)
    (checkpoint.parent / "LATEST").write_text("step-00000001\n", "utf-8")
    return path


def seal_checkpoint(checkpoint: Path) -> None:
    """A manifest that vouches for what lies there now."""
    files = {file.name: sync_and_describe(file) for file in checkpoint.iterdir() if file.name != MANIFEST}
    seal(checkpoint, {"step": 1, "files": files})
