"""A SLURM cluster of two nodes on this machine: Debian's own daemons, on loopback, with everything in one folder."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch import EMPTY, free_port

NODES = ("n1", "n2")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """The cluster in `folder`, while it is entered. cred_expire makes a requeued job wait 5 s instead of 2 minutes."""

    folder: Path
    _started: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> Slurm:
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4" for name in NODES
        )
        self.config = self.folder / "slurm.conf"
        self.config.write_text(CONFIG.format(host=host, port=free_port(), folder=self.folder, nodes=nodes), "utf-8")
        for name in ("state", *(f"spool-{name}" for name in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.sock", *files
        )
        self._start("slurmctld", "-D", "-f", str(self.config))
        for name in NODES:
            self._start("slurmd", "-D", "-f", str(self.config), "-N", name)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "the cluster to be up")
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user=root")
            self.wait(lambda: not self.run("squeue", "-h").strip(), "all jobs to be over", seconds=60)
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            process.wait(600)

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need."""
        return {"SLURM_CONF": str(self.config)}

    def run(self, *command: str, variables: Mapping[str, str] = EMPTY) -> str:
        """What one of SLURM's commands prints. Raises AssertionError where it fails."""
        environment = {**os.environ, **self.environment, **variables}
        for _ in range(5):
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
            if answer.returncode == 0:
                return answer.stdout
            time.sleep(1)  # a busy machine makes the controller slow to answer
        raise AssertionError(f"{command}: {answer.stderr}")

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def ended(self, number: str) -> bool:
        """Whether a job is over for good."""
        return self.job(number)["JobState"] in {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}

    def wait(self, until: Callable[[], bool], what: str, *, seconds: float = 180) -> None:
        """Wait for something. Raises AssertionError where it does not come."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        """The last of what the daemons wrote."""
        return "\n".join(file.read_text("utf-8")[-2000:] for file in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **self.environment}, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        time.sleep(0.2)
