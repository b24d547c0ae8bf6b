"""Starting from another run: its weights, and with them its dimensions and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.inference.loading import WEIGHTS, find_checkpoint


def with_start(config: Config) -> Config:
    """The configuration with what `model.weights` stands for, where that is a run or a checkpoint.

    Its model's dimensions stand in place of those that are not given, its tokenizer in place of
    `tokenizer.path`. Raises UserError where dimensions that are given are others.
    """
    if config.model.weights is None or not Path(config.model.weights).is_dir():
        return config
    path = find_checkpoint(Path(config.model.weights))
    known = load_config(["--config", str(path / "config.yaml")]).model.dimensions
    given = {key: value for key, value in config.model.dimensions.items() if key in config.model.model_fields_set}
    differing = [f"{key} is {value}, there {known[key]}" for key, value in given.items() if known[key] != value]
    if differing:
        raise UserError(f"model.weights {config.model.weights}: {'; '.join(differing)}; leave these model keys out")
    model = config.model.model_copy(update={**known, "weights": str(path / WEIGHTS)})
    tokenizer = config.tokenizer.model_copy(update={"path": config.tokenizer.path or str(path / "tokenizer.model")})
    return config.model_copy(update={"model": model, "tokenizer": tokenizer})
