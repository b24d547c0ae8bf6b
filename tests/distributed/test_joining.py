"""Ranks that cannot meet say why, and what helps."""

import socket
import subprocess
import sys

import pytest

from lamda.cli import main
from tests.launch import ROOT

RANK = """
import sys
from lamda.config.errors import RunError
from lamda.distributed import World, start_hosts
try:
    start_hosts(World(world_size=2), threads=1, address=sys.argv[1])
except RunError as error:
    print(error)
"""


def test_a_port_that_is_in_use_is_named_with_the_remedy():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address.rpartition(":")[2], "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", RANK, address],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{address} is in use by another process")
    assert "--master_port" in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": ""}, "RANK is '' in the environment"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_variables_that_give_no_place_are_named(monkeypatch, capsys, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain", "--config", "tiny"]) == 2
    assert message in capsys.readouterr().err
