"""Checkpoints: state by parameter name in safetensors files, for any number of ranks and any ZeRO stage.

Each rank writes the optimizer fragments that it owns, without communication, and rank 0 also the weights that the model
computes with. Loading reads the slices that a rank needs. `lamda.storage.commit` makes a checkpoint complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.distributed import barrier
from lamda.durable import Progress, umask_mode
from lamda.engines.deepspeed import lora
from lamda.engines.deepspeed.fragments import Fragment, fragments, gathered_parameters, publish_weights, reset_state
from lamda.engines.deepspeed.optimizer import fresh_state
from lamda.model import LaMDA
from lamda.model.weights import is_matrix, weight_shapes
from lamda.storage import manifest
from lamda.storage.state import RunState

Sizes = dict[tuple[str, str], int]  # elements of each (name, kind) in a checkpoint


def load(
    path: Path, engine: deepspeed.DeepSpeedEngine, *, config: Config, progress: Progress = lambda: None
) -> RunState:
    """Fill the engine from a verified checkpoint; every rank calls it. Raises UserError before anything is changed."""
    state = manifest.read_state(path)
    saved = SavedState(path, state_sizes(config))
    reset_state(engine, optimizer=config.train.optimizer, updates=state.updates)
    with torch.no_grad():
        for fragment in fragments(engine):
            for name, kind, start, tensor in _named(fragment):
                saved.fill(tensor, name=name, kind=kind, start=start)
                progress()
    publish_weights(engine)
    barrier()
    return state


def load_weights(path: Path, engine: deepspeed.DeepSpeedEngine, *, progress: Progress = lambda: None) -> None:
    """Fill the fp32 weights from a safetensors file (`model.weights`); adapters and optimizer state stay."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for fragment in fragments(engine):
            for name, kind, start, tensor in _named(fragment):
                if kind in ("weight", "frozen") and not lora.is_adapter(name):
                    tensor.copy_(file.get_tensor(name).flatten()[start : start + tensor.numel()])
                    progress()
    publish_weights(engine)


def local_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's optimizer state: (`name|kind|start`, view) for each fragment and kind."""
    for fragment in fragments(engine):
        if fragment.is_owner:
            for name, kind, start, tensor in _named(fragment):
                yield f"{name}|{kind}|{start}", tensor


def model_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """On rank 0 the weights that the model computes with, by name; at stage 3 gathered one at a time.

    Adapters (`lamda.engines.deepspeed.lora`) are merged in. A view is valid until the next one is requested. Every rank
    iterates over all of them.
    """
    model = engine.module
    for name in weight_shapes(model.config):
        with gathered_parameters(engine, [model.get_parameter(name)]):
            if engine.global_rank == 0:
                yield name, lora.merged(model, name)


def state_sizes(config: Config) -> Sizes:
    """The size of each (name, kind) that a checkpoint of this model and optimizer holds; see `_named`."""
    optimizer, sizes = config.train.optimizer, {}
    for name, shape in lora.trained_shapes(config).items():
        if config.train.lora_rank and not lora.is_adapter(name):
            sizes[name, "frozen"] = prod(shape)
            continue
        weight = torch.empty(shape, device="meta")
        state = fresh_state(weight, optimizer=optimizer, is_muon=optimizer == "muon" and is_matrix(name))
        sizes |= {(name, kind): tensor.numel() for kind, tensor in {"weight": weight, **state}.items()}
    return sizes


def _named(fragment: Fragment) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """A fragment's tensors as (name, kind, start, view)."""
    for kind, tensor in fragment.tensors.items():
        yield fragment.name, kind, fragment.start, tensor
    for kind, factor in fragment.factors.items():
        yield fragment.name, kind, 0, factor


class SavedState:
    """The optimizer files of a checkpoint, read by slices; only files that its manifest names."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self._path = path
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for name in sorted(manifest.read(path)["files"]):
            if name.startswith("optimizer-") and name.endswith(".safetensors"):
                self._index(path / name, sizes)
        self._require_each_element_once(sizes)

    def fill(self, target: torch.Tensor, *, name: str, kind: str, start: int) -> None:
        """Copy elements `start`, ... of a parameter's state into `target` ([n])."""
        for first, length, file, key in self._pieces[name, kind]:
            low, high = max(start, first), min(start + target.numel(), first + length)
            if low < high:
                with safe_open(file, "pt") as opened:
                    target[low - start : high - start].copy_(opened.get_slice(key)[low - first : high - first])

    def _index(self, file: Path, sizes: Sizes) -> None:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    piece = opened.get_slice(key)
                    parts, shape = key.split("|"), piece.get_shape()
                    is_known = len(parts) == 3 and (parts[0], parts[1]) in sizes and parts[2].isdecimal()
                    dtypes = ("F32", "BF16") if is_known and parts[1] == "frozen" else ("F32",)
                    if not is_known or len(shape) != 1 or piece.get_dtype() not in dtypes:
                        raise UserError(
                            f"{file}: holds {key!r} ({piece.get_dtype()} {shape}), which is not part of the state"
                        )
                    self._pieces.setdefault((parts[0], parts[1]), []).append((int(parts[2]), shape[0], file, key))
        except SafetensorError as error:
            raise UserError(f"{file}: is not a safetensors file ({error})") from error

    def _require_each_element_once(self, sizes: Sizes) -> None:
        for (name, kind), size in sizes.items():
            end = 0
            for first, length, file, key in sorted(self._pieces.get((name, kind), [])):
                if first != end or first + length > size:
                    raise UserError(
                        f"{file}: {key!r} holds elements {first} to {first + length} of {size}; the pieces "
                        f"before it end at {end}"
                    )
                end += length
            if end != size:
                raise UserError(f"{self._path}: {size - end} elements of {kind} of {name} are missing")


class Snapshots:
    """Copies of this rank's state in host memory, which is made once: it takes longer than a copy.

    Raises UserError where a GPU's host has too little memory.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, device: torch.device) -> None:
        self._engine, self._is_pinned = engine, device.type == "cuda"
        shapes = {f"state {name}": tensor for name, tensor in local_state(engine)}
        if engine.global_rank == 0:
            shapes |= {f"weight {name}": weight for name, weight in _weights_as_saved(engine.module)}
        self._buffers = flat_buffers(shapes, is_pinned=self._is_pinned)

    def size(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(tensor.nbytes for tensor in self._buffers.values())

    def take(self, folder: Path) -> Callable[[], list[Path]]:
        """Copy this rank's state; returns a function that writes it, from any thread. Every rank calls it."""
        weights = self._copy("weight", model_weights(self._engine))
        local = self._copy("state", local_state(self._engine))
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()
        rank, world_size = self._engine.global_rank, self._engine.world_size

        def write() -> list[Path]:
            files = {folder / f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors": local}
            if rank == 0:
                files[folder / "model.safetensors"] = weights
            for file, tensors in files.items():
                with umask_mode(file):
                    save_file(tensors, file, metadata={"format": "pt"})
            return list(files)

        return write

    def _copy(self, kind: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies by name; on a GPU they are complete once the stream is synchronized."""
        return {name: self._buffers[f"{kind} {name}"].copy_(tensor, non_blocking=True) for name, tensor in tensors}


def _weights_as_saved(model: LaMDA) -> Iterator[tuple[str, torch.Tensor]]:
    """Shapes and precision of `model_weights`, without gathering them: tensors without memory."""
    for name, shape in weight_shapes(model.config).items():
        yield name, torch.empty(shape, dtype=model.get_parameter(name).dtype, device="meta")


def flat_buffers(like: Mapping[str, torch.Tensor], *, is_pinned: bool) -> dict[str, torch.Tensor]:
    """Host memory for tensors, by name: views of one flat buffer per precision. Raises UserError if it is not there."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in like.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    flat = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
    for buffer in flat.values():
        if is_pinned:
            _pin(buffer)
    buffers, ends = {}, dict.fromkeys(sizes, 0)
    for name, tensor in like.items():
        start = ends[tensor.dtype]
        ends[tensor.dtype] += tensor.numel()
        buffers[name] = flat[tensor.dtype][start : ends[tensor.dtype]].view(tensor.shape)
    return buffers


def _pin(buffer: torch.Tensor) -> None:
    """Pin memory as it is: PyTorch's own pinned memory is rounded up to a power of two, up to twice the size."""
    cuda, address = torch.cuda.cudart(), buffer.data_ptr()
    if error := int(cuda.cudaHostRegister(address, buffer.nbytes, 0)):
        raise UserError(
            f"{buffer.nbytes / 1e9:.1f} GB of host memory for copies of checkpoints cannot be pinned (CUDA error "
            f"{error}): use more ranks, or a host with more memory (`lamda plan` counts it)"
        )
    weakref.finalize(buffer.untyped_storage(), cuda.cudaHostUnregister, address)
