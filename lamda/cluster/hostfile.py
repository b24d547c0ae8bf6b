"""Machines without a scheduler: DeepSpeed's pdsh launcher over ssh, started again by `lamda supervise`.

Variables reach the ranks through a script that every node reads; secrets go through ssh itself (SendEnv).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lamda.cluster.environment import is_secret, passed_on
from lamda.cluster.job import Job
from lamda.cluster.supervise import supervise
from lamda.config.errors import UserError
from lamda.storage.run_directory import RunDirectory

SSH_OPTIONS = ("-o BatchMode=yes", "-o ConnectTimeout=10", "-o ServerAliveInterval=10", "-o ServerAliveCountMax=3")
"""A node that vanishes ends its connection after half a minute instead of never."""
PROBE = "import lamda.cli, importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)"
UNSEEN, NO_PYTHON = 11, 12


def hosts(job: Job) -> list[str]:
    """The machines of the job."""
    return list(job.site.hostfile.hosts or ())[: job.nodes]


def command(job: Job) -> list[str]:
    """What starts the job on all machines, from one of them or from another."""
    own = job.site.hostfile
    return [
        "env", f"PDSH_SSH_ARGS_APPEND={' '.join(_ssh_options(job))}",
        job.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(job.folder / "hosts"), "--force_multi",
        "--no_ssh_check", "--master_addr", own.master_address or hosts(job)[0], "--master_port", str(own.master_port),
        "--venv_script", str(job.folder / "setup.sh"), "--quiet", "--module", job.module,
        "--config", str(job.config_file),
    ]  # fmt: skip


def files(job: Job) -> dict[str, str]:
    """The hostfile, and what each node reads first."""
    variables = passed_on(os.environ, job.site.cluster.export).items()
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables if not is_secret(name, value)]
    return {
        "hosts": "".join(f"{host} slots={job.site.cluster.ranks_per_node}\n" for host in hosts(job)),
        "setup.sh": "".join(f"{line}\n" for line in (*exports, *job.site.cluster.setup)),
    }


def script(job: Job) -> str:
    """All that `submit` would write and start, for a reader."""
    parts = [f"# {job.folder / name}\n{text}" for name, text in files(job).items()]
    return "\n".join([*parts, f"{shlex.join(command(job))}\n"])


def check(job: Job) -> None:
    """Raises UserError where there are too few machines."""
    named = len(job.site.hostfile.hosts or ())
    if named < job.nodes:
        raise UserError(f"--nodes {job.nodes}: hostfile.hosts names {named}")


def submit(job: Job) -> int:
    """Look at every machine, start the job and stay with it; the exit code. Raises UserError."""
    missing = [tool for tool in ("pdsh", "ssh") if not shutil.which(tool)]
    if missing:
        raise UserError(f"there is no {' and no '.join(missing)} on this machine; install these packages")
    job.write(**files(job))
    _check_hosts(job)
    if job.is_training:
        return supervise(command(job), RunDirectory(job.run))
    return subprocess.run(command(job), check=False).returncode


def _ssh_options(job: Job) -> list[str]:
    secrets = [f"-o SendEnv={name}" for name in _secrets(job)]
    return [*SSH_OPTIONS, *job.site.hostfile.ssh_options, *secrets]


def _secrets(job: Job) -> list[str]:
    variables = passed_on(os.environ, job.site.cluster.export)
    return [name for name, value in variables.items() if is_secret(name, value)]


def _check_hosts(job: Job) -> None:
    """Raises UserError where a machine is not reached, does not see the run directory, or has no Python of ours."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        visits = dict(zip(hosts(job), pool.map(lambda host: _visit(job, host), hosts(job)), strict=True))
    problems = list(_problems(job, {host: visit.returncode for host, visit in visits.items()}))
    if problems:
        raise UserError("\n".join(problems))
    for host, visit in visits.items():
        if lost := visit.stdout.split():
            print(
                f"{host}: {', '.join(lost)} did not come over ssh (AcceptEnv in its sshd_config allows it); its ranks "
                "use what `wandb login` and `hf auth login` have left there",
                flush=True,
            )


def _visit(job: Job, host: str) -> subprocess.CompletedProcess[str]:
    """Look around on a machine; prints the secrets that did not arrive. The exit code 255 is ssh's own."""
    python = shlex.quote(job.python)
    commands = [
        f"cd {shlex.quote(str(Path.cwd()))} && test -f {shlex.quote(str(job.config_file))} || exit {UNSEEN}",
        f". {shlex.quote(str(job.folder / 'setup.sh'))} >&2",
        f"{python} -c {shlex.quote(PROBE)} || exit {NO_PYTHON}",
        *(f'test -n "${name}" || echo {name}' for name in _secrets(job)),
    ]
    command = ["ssh", *shlex.split(" ".join(_ssh_options(job))), host, "\n".join(commands)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)


def _problems(job: Job, codes: dict[str, int]) -> Iterator[str]:
    told = {
        255: "cannot be reached over ssh without a password; try `ssh {host} true`",
        UNSEEN: f"does not see {Path.cwd()} or {job.folder}; both must be on a file system that all nodes share",
        NO_PYTHON: f"`{job.python}` cannot import deepspeed and lamda there; install them, or name another "
        "interpreter as cluster.python",
    }
    for host, code in codes.items():
        if code:
            yield f"{host}: {told.get(code, f'a visit ended with exit code {code}').format(host=host)}"
