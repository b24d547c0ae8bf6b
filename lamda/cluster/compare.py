"""Compare two runs of one configuration bit for bit: the first step at which they differ."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from lamda.config.errors import UserError
from lamda.runs.checkpoint_diff import compare_tensors
from lamda.storage.manifest import complete, framework_of, read, step_of
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory

Tensors = Mapping[str, Callable[[], torch.Tensor]]
"""Tensors by name, each read on call: a checkpoint may be larger than memory."""


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which two runs differ, and the largest difference of two numbers there.

    `largest` is None if it is not a finite number: text, a missing row, NaN, other names or shapes.
    """

    step: int
    largest: float | None = None


def compare_runs(one: RunDirectory, other: RunDirectory) -> dict[str, FirstDifference | None]:
    """The first difference of two finished runs by kind, as in the table; None if there is none."""
    return {
        "loss": compare_column(one.metrics, other.metrics, "loss"),
        "samples": compare_column(one.metrics, other.metrics, "batch_digest"),
        "weights": compare_checkpoints(one.checkpoints, other.checkpoints, weights_of),
        "optimizer state": compare_checkpoints(one.checkpoints, other.checkpoints, optimizer_state_of),
    }


def compare_column(one: Path, other: Path, name: str) -> FirstDifference | None:
    """The first step at which a column of two metrics files differs, or is in only one of them."""
    mine, theirs = ({row["step"]: row[name] for row in read_metrics(path)} for path in (one, other))
    for step in sorted({*mine, *theirs}):
        if step not in mine or step not in theirs:
            return FirstDifference(step)
        if mine[step] != theirs[step]:
            numbers = all(isinstance(value, float) for value in (mine[step], theirs[step]))
            return FirstDifference(step, abs(mine[step] - theirs[step]) if numbers else None)
    return None


def compare_checkpoints(one: Path, other: Path, read: Callable[[Path], Tensors]) -> FirstDifference | None:
    """The first checkpoint in both folders that differs. Raises UserError if they share none."""
    common = sorted({path.name for path in complete(one)} & {path.name for path in complete(other)})
    if not common:
        raise UserError(f"{one} and {other} have no checkpoint in common")
    for name in common:
        if distances := _distances(read(one / name), read(other / name)):
            largest = max(distances)
            return FirstDifference(step_of(one / name), largest if math.isfinite(largest) else None)
    return None


def weights_of(checkpoint: Path) -> Tensors:
    """The weights that the model computes with."""
    return _whole_tensors([checkpoint / "model.safetensors"])


def optimizer_state_of(checkpoint: Path) -> Tensors:
    """fp32 weights and moments of whole parameters ([n] each), for any number of ranks.

    Raises UserError if a framework other than DeepSpeed wrote them.
    """
    tensors = _whole_tensors(sorted(checkpoint.glob("optimizer-*.safetensors")))
    if not tensors:
        raise UserError(f"{checkpoint}: has no optimizer state of DeepSpeed ({framework_of(read(checkpoint))})")
    return tensors


def _whole_tensors(files: Sequence[Path]) -> Tensors:
    """Tensors by name; of one that the files hold in pieces, the key `NAME|START` says where a piece starts."""
    pieces: defaultdict[str, list[tuple[int, Path, str]]] = defaultdict(list)
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name, start = key.rsplit("|", 1) if "|" in key else (key, "0")
                pieces[name].append((int(start), path, key))
    return {name: partial(_joined, sorted(found)) for name, found in pieces.items()}


def _joined(pieces: list[tuple[int, Path, str]]) -> torch.Tensor:
    """Join the pieces of a parameter. Raises UserError if one is missing."""
    parts: list[torch.Tensor] = []
    for start, path, key in pieces:
        if start != sum(part.numel() for part in parts):
            raise UserError(f"{path.parent}: the piece before {key} is not in the checkpoint")
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor(key))
    return torch.cat(parts)


def _distances(mine: Tensors, theirs: Tensors) -> list[float]:
    """The largest difference of each pair of tensors whose bits differ; infinite if it is not finite."""
    if mine.keys() != theirs.keys():
        return [math.inf]
    pairs = ((read(), theirs[name]()) for name, read in mine.items())
    return [distance for one, other in pairs if (distance := _distance(one, other)) is not None]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """None if all bits are the same."""
    if one.shape != other.shape:
        return math.inf
    if one.dtype == other.dtype and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
        return None
    largest, _ = compare_tensors(one, other)
    return math.inf if largest is None else largest
