"""Ranks that cannot meet say why, and what helps."""

import socket
import subprocess
import sys

from tests.launch import ROOT

RANK = """
import sys
from lamda.config.errors import RunError
from lamda.distributed import World, start_hosts
try:
    start_hosts(World(size=2), threads=1, address=sys.argv[1])
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
