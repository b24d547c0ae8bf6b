"""What a run stores: checkpoints, ready rows and text."""

from __future__ import annotations

from glob import glob
from math import lcm
from pathlib import Path

from lamda.config.schema import Config
from lamda.data.card import load_card

OPTIMISER = 12
"""Bytes a parameter of the optimiser's files: fp32 weight and two moments."""
NARROW = 1 << 16
"""Ready rows hold ids of up to so many pieces in 2 bytes each."""
SPAN = 24
"""Bytes of what ready rows say of a part of a row (`lamda.data.blocks.SPAN`)."""


def checkpoint_bytes(parameters: int, *, width: int) -> int:
    """A checkpoint's tensors: `width` bytes a parameter for model.safetensors, and the optimiser's."""
    return parameters * (width + OPTIMISER)


def checkpoints(config: Config) -> int:
    """The most checkpoints that are there at a time, the one that is being written among them."""
    steps, saving = config.steps, config.checkpoint
    kept = steps // lcm(saving.every, saving.keep_every) if saving.keep_every else 0
    return min(saving.keep + 1 + kept, -(-steps // saving.every))


def block_bytes(config: Config) -> int:
    """Ready rows of the whole run (`data.cache_dir`), one span per row; each document adds some 50 bytes."""
    width = 2 if config.model.vocab_size <= NARROW else 4
    rows = config.steps * config.train.global_batch_size
    return rows * ((config.data.sequence_length + 1) * width + SPAN)


def text_bytes(config: Config) -> int | None:
    """The training text as stored: its card's sizes, or those of files on this machine; None where neither tells.

    Raises UserError for a card that cannot be read.
    """
    known = 0
    for source in load_card(config.data).sources:
        found = [path for pattern in source.files for path in glob(pattern, recursive=True)]  # noqa: PTH207 - may be absolute
        sizes = [checksum.size for checksum in source.checksums.values()] or [
            Path(path).stat().st_size for path in found
        ]
        if not sizes:
            return None
        known += sum(sizes)
    return known


def is_streamed(config: Config) -> bool:
    """Whether any of the training text is read over a network, and so not stored."""
    return any(
        source.dataset is not None or any("://" in pattern for pattern in source.files)
        for source in load_card(config.data).sources
    )
