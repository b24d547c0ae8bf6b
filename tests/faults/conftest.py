"""A place for runs, and the unbroken runs that all others are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

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
