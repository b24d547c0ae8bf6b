"""The JAX twin's tests need the extra `flax`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

jax = pytest.importorskip("jax", reason="the extra `flax` is not installed")


@pytest.fixture
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
