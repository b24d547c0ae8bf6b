"""Machines on this machine: network namespaces with addresses of their own, an sshd in each, and links to cut."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.213.77"
LOGIN = "lamda-login"
CONFIG = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
AcceptEnv HF_TOKEN
"""


@dataclass
class Hosts:
    """A login machine and two nodes on one switch, while it is entered; all share this machine's files."""

    folder: Path
    _started: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> Hosts:
        self._remove()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        Path("/run/sshd").mkdir(exist_ok=True)
        _run("ip", "netns", "add", LOGIN)
        _run("ip", "-n", LOGIN, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", LOGIN, "addr", "add", f"{NETWORK}.254/24", "dev", "switch")
        _run("ip", "-n", LOGIN, "link", "set", "switch", "up")
        for number in (1, 2):
            self._add(number)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        self._remove()

    @property
    def addresses(self) -> list[str]:
        """Of the nodes."""
        return [f"{NETWORK}.1", f"{NETWORK}.2"]

    @property
    def ssh_options(self) -> list[str]:
        """So that no file of the user's is read or written."""
        options = ("IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        return ["-F /dev/null", f"-i {self.folder}/key", *(f"-o {option}" for option in options)]

    def on_login(self, *command: str) -> list[str]:
        """A command, as the login machine runs it."""
        return ["ip", "netns", "exec", LOGIN, *command]

    def set_link(self, number: int, state: str) -> None:
        """Cut (`down`) or mend (`up`) a node's link."""
        _run("ip", "-n", LOGIN, "link", "set", f"port{number}", state)

    def _add(self, number: int) -> None:
        name, address = f"lamda-node{number}", f"{NETWORK}.{number}"
        _run("ip", "netns", "add", name)
        _run(
            "ip", "link", "add", f"port{number}", "netns", LOGIN, "type", "veth", "peer", "name", "eth0", "netns", name
        )
        _run("ip", "-n", LOGIN, "link", "set", f"port{number}", "master", "switch", "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")
        config = self.folder / f"sshd-{number}.conf"
        config.write_text(CONFIG.format(address=address, folder=self.folder), "utf-8")
        with (self.folder / f"sshd-{number}.log").open("ab") as log:
            sshd = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
            self._started.append(subprocess.Popen(sshd, stdout=log, stderr=log, start_new_session=True))
        _wait_for_port(address)

    def _remove(self) -> None:
        for name in (LOGIN, "lamda-node1", "lamda-node2"):
            if Path(f"/run/netns/{name}").exists():
                _run("ip", "netns", "del", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _wait_for_port(address: str) -> None:
    deadline = time.monotonic() + 60
    probe = f"import socket; socket.create_connection(({address!r}, 22), timeout=1)"
    while subprocess.run(
        ["ip", "netns", "exec", LOGIN, "python3", "-c", probe], capture_output=True, check=False
    ).returncode:
        assert time.monotonic() < deadline, f"no sshd on {address}"
        time.sleep(0.2)
