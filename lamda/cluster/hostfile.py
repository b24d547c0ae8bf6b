"""Machines without a scheduler: DeepSpeed's pdsh launcher over ssh, restarted by `lamda supervise`.

Variables reach the ranks through a script that every node reads; secrets go through ssh itself (SendEnv).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lamda.cluster.job import Job
from lamda.cluster.supervise import supervise
from lamda.config.errors import UserError
from lamda.storage.run_directory import RunDirectory

SSH_OPTIONS = ("-o BatchMode=yes", "-o ConnectTimeout=10", "-o ServerAliveInterval=10", "-o ServerAliveCountMax=3")
"""The connection to a lost node ends after half a minute instead of never."""
PROBE = "import lamda.cli, importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)"
NOT_SHARED, NO_PYTHON = 11, 12


def hosts(job: Job) -> list[str]:
    """The hosts of the job."""
    return list(job.site.hostfile.hosts or ())[: job.nodes]


def command(job: Job) -> list[str]:
    """The command that starts the job on all hosts, from any machine."""
    site = job.site.hostfile
    return [
        "env", f"PDSH_SSH_ARGS_APPEND={' '.join(_ssh_options(job))}",
        job.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(job.folder / "hosts"), "--force_multi",
        "--no_ssh_check", "--master_addr", site.master_address or hosts(job)[0], "--master_port", str(site.master_port),
        "--venv_script", str(job.folder / "setup.sh"), "--quiet", "--module", job.module, *job.options,
        "--config", str(job.config_file),
    ]  # fmt: skip


def files(job: Job) -> dict[str, str]:
    """The hostfile, and the script that each node sources first."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()]
    return {
        "hosts": "".join(f"{host} slots={job.site.cluster.ranks_per_node}\n" for host in hosts(job)),
        "setup.sh": "".join(f"{line}\n" for line in (*exports, *job.site.cluster.setup)),
    }


def script(job: Job) -> str:
    """All files and the command of `submit`, as text."""
    parts = [f"# {job.folder / name}\n{text}" for name, text in files(job).items()]
    return "\n".join([*parts, f"{shlex.join(command(job))}\n"])


def check(job: Job) -> None:
    """Raises UserError if there are too few hosts."""
    named = len(job.site.hostfile.hosts or ())
    if named < job.nodes:
        raise UserError(f"--nodes {job.nodes}: hostfile.hosts names {named}")


def submit(job: Job) -> int:
    """Check every host, start the job and wait for it; returns the exit code. Raises UserError."""
    missing = [tool for tool in ("pdsh", "ssh") if not shutil.which(tool)]
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)} on this machine; install {'it' if len(missing) == 1 else 'them'}"
        )
    job.write(**files(job))
    _check_hosts(job)
    if job.is_training:
        return supervise(command(job), RunDirectory(job.run))
    return subprocess.run(command(job), check=False).returncode


def _ssh_options(job: Job) -> list[str]:
    secrets = [f"-o SendEnv={name}" for name in job.secrets]
    return [*SSH_OPTIONS, *job.site.hostfile.ssh_options, *secrets]


def _check_hosts(job: Job) -> None:
    """Raises UserError if a host is not reachable, does not see the run directory, or has no suitable Python."""
    reasons = {
        255: "cannot be reached over ssh without a password; try `ssh HOST true`",
        NOT_SHARED: f"does not see {Path.cwd()} or {job.folder}; both must be on a shared file system",
        NO_PYTHON: f"`{job.python}` cannot import deepspeed and lamda there; install them, or name another "
        "interpreter as cluster.python",
    }
    with ThreadPoolExecutor(max_workers=32) as pool:
        probes = dict(zip(hosts(job), pool.map(lambda host: _probe(job, host), hosts(job)), strict=True))
    codes = {host: probe.returncode for host, probe in probes.items() if probe.returncode}
    problems = [
        f"{host}: {reasons.get(code, f'the check ended with exit code {code}')}" for host, code in codes.items()
    ]
    if problems:
        raise UserError("\n".join(problems))
    for host, probe in probes.items():
        if lost := probe.stdout.split():
            print(
                f"{host}: {', '.join(lost)} not accepted over ssh (allow them with AcceptEnv in its sshd_config); its "
                "ranks use the stored credentials of `wandb login` and `hf auth login`",
                flush=True,
            )


def _probe(job: Job, host: str) -> subprocess.CompletedProcess[str]:
    """Check a host over ssh; prints the secrets that did not arrive. Exit code 255 is from ssh itself."""
    python = shlex.quote(job.python)
    commands = [
        f"cd {shlex.quote(str(Path.cwd()))} && test -f {shlex.quote(str(job.config_file))} || exit {NOT_SHARED}",
        f". {shlex.quote(str(job.folder / 'setup.sh'))} >&2",
        f"{python} -c {shlex.quote(PROBE)} || exit {NO_PYTHON}",
        *(f'test -n "${name}" || echo {name}' for name in job.secrets),
    ]
    command = ["ssh", *shlex.split(" ".join(_ssh_options(job))), host, "\n".join(commands)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
