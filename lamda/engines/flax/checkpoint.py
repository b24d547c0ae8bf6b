"""Checkpoints of a Flax run: Orbax stores the training state, `model.safetensors` the weights that every reader knows.

    state/              fp32 weights and optimizer state, written by Orbax, each process its shards
    model.safetensors   the weights that the model computes with, by plain name

Orbax restores a state onto any mesh. The manifest shows whether a checkpoint is complete (`lamda.storage.commit`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from lamda.config.errors import UserError
from lamda.engines.flax.step import TrainState
from lamda.engines.flax.weights import plain_weights, save_weights
from lamda.inference.loading import WEIGHTS
from lamda.storage.manifest import read

STATE = "state"


class Checkpointer:
    """Writes one checkpoint at a time, and reads them. Every process makes the same calls."""

    def __init__(self, *, dtype: DTypeLike, is_main_process: bool) -> None:
        self._dtype, self._is_main_process = dtype, is_main_process
        self._orbax = ocp.StandardCheckpointer()

    def size(self, state: TrainState) -> int:
        """Bytes that this process writes: its shards of the state, and on the first process also the weights."""
        shards = sum(
            shard.data.nbytes
            for array in jax.tree.leaves(state)
            for shard in array.addressable_shards
            if shard.replica_id == 0
        )
        itemsize = jax.numpy.dtype(self._dtype).itemsize
        return shards + self._is_main_process * sum(weight.size * itemsize for weight in state.weights.values())

    def take(self, state: TrainState, folder: Path) -> Callable[[], list[Path]]:
        """Copy the state to host memory; returns a function that writes it into `folder`, from any thread."""
        weights = {name: weight.astype(self._dtype) for name, weight in state.weights.items()}
        plain = {name: full for name, full in plain_weights(weights) if self._is_main_process}
        target = (folder / STATE).absolute()
        self._orbax.save(target, state)

        def write() -> list[Path]:
            self._orbax.wait_until_finished()
            if not self._is_main_process:
                return []
            save_weights(plain, folder / WEIGHTS)
            return [folder / WEIGHTS, *(path for path in (folder / STATE).rglob("*") if path.is_file())]

        return write

    def read(self, path: Path, like: TrainState) -> TrainState:
        """The state of a checkpoint. like: arrays with its shapes and the target shardings.

        Raises UserError if there is a file that the manifest does not list: Orbax would read it.
        """
        present = {file.relative_to(path).as_posix() for file in (path / STATE).rglob("*") if not file.is_dir()}
        if unlisted := sorted(present - read(path)["files"].keys()):
            raise UserError(f"{path}: manifest.json does not list {unlisted[0]}; use another checkpoint")
        return self._orbax.restore((path / STATE).absolute(), like)
