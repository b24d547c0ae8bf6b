"""A place for runs, and the unbroken runs that all others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

from lamda.distributed import World
from tests.faults.harness import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Place:
    """Corpus, tokenizer and configuration."""
    return Place.make(tmp_path_factory.mktemp("faults"), tokenizer_path)


@pytest.fixture(scope="session")
def straight(place: Place) -> Callable[[int], str]:
    """The unbroken run on two ranks at a ZeRO stage, made when it is first asked for."""

    @cache
    def make(stage: int) -> str:
        place.finish(f"straight-{stage}", stage=stage)
        return f"straight-{stage}"

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The only rank of a gloo group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()
