"""A copy of an engine's state in host memory, and the files that it becomes.

Each rank writes the optimiser's fragments that it owns, without communication; rank 0 the weights that the model
computes with. `lamda.engines.deepspeed.checkpoint` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lamda.durable import umask_mode
from lamda.engines.deepspeed.checkpoint import own_tensors
from lamda.model.weights import weight_shapes

if TYPE_CHECKING:
    from lamda.engines.deepspeed.engine import Engine


class Snapshots:
    """Takes one copy after the other, into the same memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = _HostMemory(pinned=engine.device.type == "cuda")

    def size(self) -> int:
        """Bytes of this rank's tensors."""
        size = sum(tensor.nbytes for _, tensor in own_tensors(self._engine))
        if self._engine.world.is_main:
            model = self._engine.model
            for name, shape in weight_shapes(self._engine.config.model).items():
                size += model.get_parameter(name).element_size() * prod(shape)
        return size

    def take(self, folder: Path) -> Callable[[], list[Path]]:
        """Copy this rank's state; what writes it into `folder`, from any thread, and returns the files.

        The copy is valid until the next one is taken. Every rank calls it.
        """
        weights = self._memory.take(self._engine.weights())
        own = self._memory.take(own_tensors(self._engine))
        self._memory.wait()
        world = self._engine.world

        def write() -> list[Path]:
            files = {folder / f"optimizer-{world.rank:05d}-of-{world.size:05d}.safetensors": own}
            if world.is_main:
                files[folder / "model.safetensors"] = weights
            for file, tensors in files.items():
                with umask_mode(file):
                    save_file(tensors, file, metadata={"format": "pt"})
            return list(files)

        return write


class _HostMemory:
    """Copies of tensors in host memory, allocated once: fresh memory costs more than the copy."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._places: dict[str, torch.Tensor] = {}

    def take(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copy each; valid until the next call with the same names, and on a GPU after `wait`."""
        taken = {}
        for name, tensor in tensors:
            if name not in self._places:
                self._places[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            taken[name] = self._places[name].copy_(tensor, non_blocking=True)
        return taken

    def wait(self) -> None:
        """Wait until the copies are there."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()
