"""Fixtures that several parts share."""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import zstandard
from hypothesis import settings

from lamda import distributed
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import train_tokenizer
from lamda.distributed import World

# One thread a worker: OpenMP's threads wait for one another in a busy loop, which made tests beside others up to 13
# times as slow. Processes that tests start inherit both; those with more threads sleep while they wait.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = {"TRITON_INTERPRET": "1"} if DEVICE.type == "cpu" else {}
"""What Triton wants in the environment when it is first imported and whenever a kernel runs, and nobody else."""

# The same examples in every run, so that a test passes or fails for what was changed.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Here, before any test's imports: PyTorch's counter of FLOPs and others import Triton too.
if find_spec("triton") is not None:
    with patch.dict(os.environ, INTERPRETED):
        importlib.import_module("lamda.model.attention.kernel_ops")

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "with",
    "as",
    "be",
    "this",
    "have",
    "from",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
]


def make_text(seed: int, words: int) -> str:
    """Random sentences, the same for the same seed."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice(["", "", ".\n", ","]) for _ in range(words))


def write_shard(path: Path, texts: Sequence[str], *, domain: str = "words") -> Path:
    """A shard in The Pile's format; zstd where the name says so."""
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path


@contextmanager
def full_disk() -> Iterator[None]:
    """Every write to a file fails, whoever asks for it and wherever; folders and empty files can be made."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([make_text(seed, 200) for seed in range(20)], path, vocab_size=400)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_path`."""
    return Tokenizer.load(tokenizer_path)


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[Sequence[Sequence[str]]], Path]:
    """Writes lists of texts as shards and returns their folder."""

    def write(files: Sequence[Sequence[str]]) -> Path:
        for index, texts in enumerate(files):
            write_shard(tmp_path / "text" / f"{index:02}.jsonl.zst", texts)
        return tmp_path / "text"

    return write


@pytest.fixture(scope="session")
def process_group() -> Iterator[torch.device]:
    """A group of one rank, which DeepSpeed keeps for the life of the process, and that rank's device.

    Its variables are taken back, so that processes which tests start are ranks of nothing.
    """
    with patch.dict(os.environ):
        device = distributed.start(World(), threads=1)
    yield device
    distributed.stop()


@pytest.fixture(scope="session")
def world(process_group: torch.device) -> World:
    """That only rank."""
    return World()


@pytest.fixture(scope="module")
def device(process_group: torch.device) -> Iterator[torch.device]:
    """Its device, for engines: DeepSpeed looks for a launcher's variable whenever it makes one."""
    with patch.dict(os.environ, {"LOCAL_RANK": "0"}):
        yield process_group
