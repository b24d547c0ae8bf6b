"""The state of an unfinished run of `benchmark.py learning`, so that hours of training survive an interruption."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.learning_peers import Learner

EVERY = 300.0
"""Seconds between two saved states."""


@dataclass
class Progress:
    """Steps done, their curves of [tokens, nats], and their seconds."""

    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


def state_file(folder: Path, key: str) -> Path:
    """Where the run with this identity keeps its state."""
    return folder / f"unfinished-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def save(path: Path, learner: Learner, progress: Progress) -> None:
    """Replace the saved state atomically."""
    state = {
        "module": learner.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "progress": asdict(progress),
    }
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def load(path: Path, learner: Learner) -> Progress:
    """Bring the learner to the saved state, if there is one."""
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location="cpu", weights_only=True)
    learner.module.load_state_dict(state["module"])
    for optimizer, own in zip(learner.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return Progress(**state["progress"])
