"""Starting from another run (`model.weights`): its weights, and with them its dimensions and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.inference.loading import WEIGHTS, find_checkpoint, saved_config
from lamda.model.weights import check_shapes, weight_shapes


def with_start(config: Config) -> Config:
    """The configuration with what `model.weights` stands for, where that is a run or a checkpoint.

    Its model's dimensions stand in place of those that are not given, its tokenizer in place of
    `tokenizer.path`. Raises UserError where dimensions that are given are others.
    """
    if config.model.weights is None or not Path(config.model.weights).is_dir():
        return config
    path = find_checkpoint(Path(config.model.weights))
    known = saved_config(path).model.dimensions
    given = {key: value for key, value in config.model.dimensions.items() if key in config.model.model_fields_set}
    differing = [f"{key} is {value}, there {known[key]}" for key, value in given.items() if known[key] != value]
    if differing:
        raise UserError(f"model.weights {config.model.weights}: {'; '.join(differing)}; leave these model keys out")
    model = config.model.model_copy(update={**known, "weights": str(path / WEIGHTS)})
    tokenizer = config.tokenizer.model_copy(update={"path": config.tokenizer.path or str(path / "tokenizer.model")})
    return config.model_copy(update={"model": model, "tokenizer": tokenizer})


def check_weights(path: Path, model: ModelConfig) -> None:
    """Raise UserError where `path` is no safetensors file with this model's weights."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights {path}: cannot be read ({error})") from error
    check_shapes(weight_shapes(model), found)
