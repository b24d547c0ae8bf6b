"""What is in a checkpoint: state by parameter name, in safetensors, for any ranks and ZeRO stage.

Each rank saves the optimiser fragments that it owns, without communication; loading reads the slices
that a rank needs. `lamda.engines.deepspeed.snapshot` writes it, `lamda.storage.commit` makes it complete or not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.distributed import barrier
from lamda.engines.deepspeed import lora
from lamda.engines.deepspeed.fragments import Fragment, fragments, reset_state
from lamda.engines.deepspeed.optimizer import fresh_state
from lamda.model.weights import is_matrix
from lamda.storage import commit
from lamda.storage.state import RunState

if TYPE_CHECKING:
    from lamda.engines.deepspeed.engine import Engine

Sizes = dict[tuple[str, str], int]
"""Elements of each (name, kind) in a checkpoint."""


def load(path: Path, *, engine: Engine) -> RunState:
    """Fill the engine from a verified checkpoint; every rank calls it. Raises UserError before anything is filled."""
    state = commit.read_state(path)
    saved = SavedState(path, state_sizes(engine.config))
    reset_state(engine.deepspeed, optimizer=engine.config.train.optimizer, updates=state.updates)
    with torch.no_grad():
        for fragment in fragments(engine.deepspeed):
            for name, kind, start, tensor in _named(fragment):
                saved.fill(tensor, name=name, kind=kind, start=start)
                engine.progress()
    engine.publish_weights()
    barrier()
    return state


def load_weights_alone(path: Path, *, engine: Engine) -> None:
    """Start from weights alone (`model.weights`): the fp32 masters are these, the optimiser's state is none.

    Adapters stay as they are.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        for fragment in fragments(engine.deepspeed):
            for name, kind, start, tensor in _named(fragment):
                if kind in ("weight", "frozen") and not lora.is_adapter(name):
                    tensor.copy_(file.get_tensor(name).flatten()[start : start + tensor.numel()])
                    engine.progress()
    engine.publish_weights()


def own_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's optimiser state: (key, view) for each piece and kind, its place in the key."""
    for fragment in fragments(engine.deepspeed):
        if fragment.is_owner:
            for name, kind, start, tensor in _named(fragment):
                yield f"{name}|{kind}|{start}", tensor


def state_sizes(config: Config) -> Sizes:
    """All that a checkpoint of this model and optimiser holds; `_named` says under which names."""
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
    """The optimiser files of a checkpoint, read by slices; only files that its manifest names."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self._path = path
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for name in sorted(commit.read(path)["files"]):
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
                    there = opened.get_slice(key)
                    parts, shape = key.split("|"), there.get_shape()
                    fits = len(parts) == 3 and (parts[0], parts[1]) in sizes and parts[2].isdecimal()
                    dtypes = ("F32", "BF16") if fits and parts[1] == "frozen" else ("F32",)
                    if not fits or len(shape) != 1 or there.get_dtype() not in dtypes:
                        raise UserError(
                            f"{file}: holds {key!r} ({there.get_dtype()} {shape}), which is no part of the state"
                        )
                    self._pieces.setdefault((parts[0], parts[1]), []).append((int(parts[2]), shape[0], file, key))
        except SafetensorError as error:
            raise UserError(f"{file}: is no safetensors file ({error})") from error

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
