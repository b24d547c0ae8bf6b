"""A process group of one, for what speaks through collectives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lamda.distributed import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The only rank of a gloo group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()
