"""Where a run comes from: code, libraries, machines, command and settings of each start.

Every start appends its record to RUN/starts.jsonl and saves it in its checkpoints (`start.json`), so that a resume can
say what differs. Environment variables are not recorded.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lamda
from lamda.config import ds_config
from lamda.config.schema import Config
from lamda.distributed import World, gather

PACKAGES = (
    "torch", "deepspeed", "triton", "torchao", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece",
    "safetensors", "datasets",
)  # fmt: skip
"""Libraries that results may depend on."""
_SOURCE = Path(lamda.__file__).parent
_COMMAND_SECONDS = 20.0
_CREDENTIALS = re.compile(r"//[^/\s]*@")


def describe_start(config: Config, world: World, *, framework: str) -> dict[str, Any]:
    """The record of this start, on rank 0; every rank calls it. hosts: their number by kind, without names."""
    hosts = gather(_host() if world.local_rank == 0 else None)
    if not world.is_main_process:
        return {}
    return {
        "time": time.time(),
        "lamda": lamda.__version__,
        "git": git_state(),
        "source": code_digest(),
        "python": platform.python_version(),
        "packages": {name: found for name, found in versions(PACKAGES).items() if found is not None},
        "cuda": _cuda(),
        "driver": driver_version(),
        "framework": framework,
        "ranks": world.world_size,
        "hosts": dict(Counter(host for host in hosts if host is not None)),
        "command": [_CREDENTIALS.sub("//***@", word) for word in sys.argv],
        "config": config.model_dump(mode="json"),
        "deepspeed": ds_config.read(config),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether tracked files differ from it; None outside a checkout."""
    # An environment inside another project's repository holds files that this repository does not track.
    if not _output("git", "ls-files", "__init__.py"):
        return None
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if described is None:
        return None
    commit, mark, _ = described.partition("-dirty")
    return {"commit": commit, "dirty": bool(mark)}


def code_digest() -> str:
    """A short hash of the package's source files."""
    digest = sha256()
    for file in sorted(_SOURCE.rglob("*.py")):
        digest.update(str(file.relative_to(_SOURCE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed versions of packages by name, None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version, None if there is no driver."""
    if not shutil.which("nvidia-smi"):
        return None
    return next(
        iter((_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split()), None
    )


def cpu_name() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _host() -> str:
    """This machine's kind: `AMD EPYC 9654, 192 cores, 8 x NVIDIA H200`."""
    import torch

    names = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return ", ".join([cpu_name(), f"{os.cpu_count()} cores", *(f"{count} x {name}" for name, count in names.items())])


def _cuda() -> str | None:
    import torch

    return torch.version.cuda


def _output(*command: str) -> str | None:
    """What a command prints, None where it fails."""
    # Without GIT_DIR and the like, which a hook of another repository leaves to its children.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        result = subprocess.run(
            command, cwd=_SOURCE, env=environment, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
