"""Saving and loading a run: state by parameter name, in safetensors, for any ranks and ZeRO stage.

Each rank writes the optimiser fragments that it owns, without communication; loading reads the
slices that a rank needs. `lamda.training.manifest` makes a checkpoint complete or not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.distributed import agree, barrier, gather, on_main
from lamda.model.weights import PlainSlice, check_shapes, plain_slices
from lamda.training.engine import Engine
from lamda.training.fragments import MOMENTS, Fragment, fragments, reset_moments
from lamda.training.manifest import commit, make_fresh, sync_and_describe
from lamda.training.state import RunState

KINDS = ("weight", *MOMENTS)


def save(folder: Path, *, engine: Engine, state: RunState, keep: int, config_yaml: str, tokenizer: Path) -> Path:
    """Save step `state.step` under `folder`, then prune to the `keep` newest. Returns its path.

    Every rank calls it. Raises UserError on all ranks where any of them could not write.
    """
    world = engine.world
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    on_main(world, lambda: make_fresh(temporary))
    weights = engine.plain_weights()
    files = agree(world, lambda: _write_own(temporary, engine, state, weights, config_yaml, tokenizer))
    manifest = {
        "step": state.step,
        "ranks": world.size,
        "zero_stage": engine.stage,
        "model": engine.config.model.model_dump(exclude={"preset", "weights"}),
        "files": {name: entry for part in gather(files) for name, entry in part.items()},
    }
    on_main(world, lambda: commit(temporary, final, manifest, keep=keep))
    return final


def load(path: Path, *, engine: Engine) -> RunState:
    """Fill the engine from a verified checkpoint; every rank calls it."""
    state = RunState.read(path / "run_state.json")
    reset_moments(engine.deepspeed, updates=state.updates)
    slices = plain_slices(engine.config.model)
    saved = _SavedState(path)
    with torch.no_grad():
        for fragment in fragments(engine.deepspeed):
            for piece, start, tensors in _by_plain_name(fragment, slices):
                for kind in KINDS:
                    saved.fill(tensors[kind], name=piece.name, kind=kind, start=start)
    engine.publish_weights()
    barrier()
    return state


def check_weights(path: Path, model: ModelConfig) -> None:
    """Raise UserError where `path` is no safetensors file with this model's weights."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights {path}: cannot be read ({error})") from error
    check_shapes({plain.name: plain.shape for part in plain_slices(model).values() for plain in part}, found)


def load_weights_alone(path: Path, *, engine: Engine) -> None:
    """Start from weights alone (`model.weights`): the fp32 masters are these, the moments zero."""
    slices = plain_slices(engine.config.model)
    with safe_open(path, "pt") as file, torch.no_grad():
        for fragment in fragments(engine.deepspeed):
            for piece, start, tensors in _by_plain_name(fragment, slices):
                whole = file.get_tensor(piece.name).flatten()
                tensors["weight"].copy_(whole[start : start + tensors["weight"].numel()])
    engine.publish_weights()


def _write_own(
    folder: Path,
    engine: Engine,
    state: RunState,
    weights: dict[str, torch.Tensor],
    config_yaml: str,
    tokenizer: Path,
) -> dict[str, dict[str, str | int]]:
    """Write this rank's files and return name -> size and sha256."""
    world = engine.world
    try:
        written = [_write_fragments(folder, engine)]
        if world.is_main:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            state.write(folder / "run_state.json")
            (folder / "config.yaml").write_text(config_yaml, "utf-8")
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
            written += [
                folder / name for name in ("model.safetensors", "run_state.json", "config.yaml", "tokenizer.model")
            ]
        return {file.name: sync_and_describe(file) for file in written}
    except OSError as error:
        raise UserError(f"checkpoint {folder}: rank {world.rank} cannot write ({error.strerror})") from error


def _write_fragments(folder: Path, engine: Engine) -> Path:
    """This rank's optimiser state: a tensor for each piece and kind, its place in the key."""
    slices = plain_slices(engine.config.model)
    tensors = {
        f"{piece.name}|{kind}|{start}": pieces[kind].cpu().clone()
        for fragment in fragments(engine.deepspeed)
        if fragment.is_owner
        for piece, start, pieces in _by_plain_name(fragment, slices)
        for kind in KINDS
    }
    path = folder / f"optimizer-{engine.world.rank:05d}-of-{engine.world.size:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _by_plain_name(
    fragment: Fragment, slices: dict[str, list[PlainSlice]]
) -> Iterator[tuple[PlainSlice, int, dict[str, torch.Tensor]]]:
    """Cut a fragment of a packed parameter into pieces of plain ones: (plain, start in it, views)."""
    for plain in slices[fragment.name]:
        first = max(fragment.start, plain.start)
        last = min(fragment.start + fragment.numel, plain.start + plain.numel)
        if first < last:
            views = {
                kind: tensor[first - fragment.start : last - fragment.start]
                for kind, tensor in fragment.tensors.items()
            }
            yield plain, first - plain.start, views


class _SavedState:
    """The optimiser files of a checkpoint, read by slices."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for file in sorted(path.glob("optimizer-*.safetensors")):
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, kind, start = key.split("|")
                    length = opened.get_slice(key).get_shape()[0]
                    self._pieces.setdefault((name, kind), []).append((int(start), length, file, key))

    def fill(self, target: torch.Tensor, *, name: str, kind: str, start: int) -> None:
        """Copy elements `start`, ... of a parameter's state into `target` ([n] fp32)."""
        missing = target.numel()
        for first, length, file, key in self._pieces.get((name, kind), []):
            low, high = max(start, first), min(start + target.numel(), first + length)
            if low < high:
                with safe_open(file, "pt") as opened:
                    target[low - start : high - start].copy_(opened.get_slice(key)[low - first : high - first])
                missing -= high - low
        if missing:
            raise UserError(f"{self._path}: {missing} elements of {kind} of {name} are not in the checkpoint")
