"""Weights by plain name: from a checkpoint to shards, and from shards to one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamda.config import Config, ModelConfig
from lamda.config.errors import UserError
from lamda.durable import read_regular, umask_mode
from lamda.inference.loading import WEIGHTS
from lamda.model.weights import check_shapes, is_matrix, weight_shapes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INDEX = f"{WEIGHTS}.index.json"
_STORED = {"BF16": "bfloat16", "F32": "float32"}

Read = Callable[[str], Tensor]
"""The weight of a name."""


def write_shards(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Read, *, dtype: str, max_shard_size: str
) -> None:
    """Write model.safetensors, or numbered shards with their index; one shard is in memory at a time.

    max_shard_size: such as `5GB`. Raises UserError for an invalid size, and OSError if a file cannot be written.
    """
    width = DTYPES[dtype].itemsize
    try:
        plan = split_state_dict_into_shards_factory(
            dict(shapes),
            get_storage_size=lambda shape: prod(shape) * width,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"--max-shard-size {max_shard_size}: is not a size; use one such as 5GB or 500MB") from error
    for name, weights in plan.filename_to_tensors.items():
        shard = {weight: read(weight).to(DTYPES[dtype]).contiguous() for weight in weights}
        with umask_mode(folder / name):
            _save(shard, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")


def _save(weights: dict[str, Tensor], file: Path) -> None:
    """Raises OSError if the file cannot be written, as on a full disk."""
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


class StoredWeights:
    """The weights in a folder, in one file or in shards, read on request. dtype: of all, a name of DTYPES."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Check every file. Raises UserError if they are not this model's weights, or cannot be read."""
        self._place: dict[str, Path] = {}
        shapes, dtypes = {}, set()
        for file in _files(folder):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                        if name in self._place:
                            raise UserError(f"{name} is in two files: {self._place[name]} and {file}")
                        self._place[name] = file
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
                        dtypes.add(opened.get_slice(name).get_dtype())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: cannot be read ({error})") from error
        check_shapes(weight_shapes(model), shapes)
        if len(dtypes) != 1 or not dtypes <= _STORED.keys():
            raise UserError(
                f"{folder}: the weights are of type {', '.join(sorted(dtypes))}; save them all in bfloat16 or float32"
            )
        self.dtype = _STORED[dtypes.pop()]

    def read(self, name: str) -> Tensor:
        """The weight of that name. Raises UserError if it cannot be read."""
        file = self._place[name]
        try:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises UserError if there are none, or some are in another folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index: dict[str, Any] = json.loads(read_regular(folder / INDEX))
        names = sorted({*index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: there is no {WEIGHTS}, and {INDEX} cannot be read ({error})") from error
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise UserError(f"{folder / INDEX}: names {foreign[0]!r}, which is not a plain file name")
    return [folder / name for name in names]


def master_weights(checkpoint: Path, config: Config) -> Read:
    """The optimizer's fp32 master weights, with adapters merged. Raises UserError if a checkpoint has none."""
    # These import DeepSpeed, which an export of the stored weights does not need.
    from lamda.engines.deepspeed.checkpoint import SavedState, state_sizes
    from lamda.storage import manifest

    if not (checkpoint / manifest.MANIFEST).is_file() or not [*checkpoint.glob("optimizer-*.safetensors")]:
        raise UserError(
            f"{checkpoint}: has no optimizer state of DeepSpeed, whose fp32 weights --dtype float32 needs (a Flax "
            "run keeps them with Orbax); leave --dtype out"
        )
    saved = SavedState(checkpoint, state_sizes(config))
    adapted = config.train.lora_rank > 0
    shapes = weight_shapes(config.model)

    def filled(name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        target = torch.empty(shape)
        saved.fill(target.view(-1), name=name, kind=kind, start=0)
        return target

    def adapter(name: str) -> Tensor:
        rank, (outputs, inputs) = config.train.lora_rank, shapes[name]
        stem = name.removesuffix("weight")
        b = filled(f"{stem}lora_b.weight", "weight", (outputs, rank))
        return b @ filled(f"{stem}lora_a.weight", "weight", (rank, inputs))

    def read(name: str) -> Tensor:
        weight = filled(name, "frozen" if adapted else "weight", shapes[name])
        return weight + adapter(name) if adapted and is_matrix(name) else weight

    return read
