"""How the JAX side finds its processes."""

from __future__ import annotations

import jax
import pytest

from lamda.config.errors import UserError
from lamda.flax.framework import Flax


def test_a_process_alone_is_told_that_multihost_finds_no_others(monkeypatch):
    def alone() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # it would stay for the tests after this one
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    with pytest.raises(UserError, match=r"--multihost: .*coordinator_address.*Leave the option out"):
        Flax(multihost=True).world()
