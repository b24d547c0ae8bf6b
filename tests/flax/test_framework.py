"""How the JAX side finds its processes."""

from __future__ import annotations

import re

import jax

from lamda.launch.pretrain_flax import main


def test_a_process_alone_is_reported_that_multihost_finds_no_others(monkeypatch, capsys):
    def alone() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # it would stay for the tests after this one
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    assert main(["--multihost", "--config", "tiny"]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"--multihost: .*coordinator_address.*Leave the option out, or start with torchrun\n", message)
