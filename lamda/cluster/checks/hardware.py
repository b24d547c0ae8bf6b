"""GPUs, processor cores and host memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning
from lamda.cluster.memory import MemorySetting, host_bytes_offloaded, snapshot_bytes
from lamda.cluster.zero import Sharding
from lamda.config import ds_config
from lamda.training.provenance import driver_version

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.9
"""Fraction of GPU memory; if less is free, another process uses the GPU."""
BF16_ERROR = 0.02
SIZE, REPEATS = 4096, 20
SHARED_BYTES = 1 << 30
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage of a control group, in versions 2 and 1."""


def gpu(subject: Subject) -> Finding:
    """Check that this rank has a GPU of its own."""
    import torch

    driver = driver_version()
    if not torch.cuda.is_available():
        if driver:
            return failure(
                f"nvidia-smi shows driver {driver}, but torch {torch.__version__} sees no GPU",
                "install torch for CUDA, and check that the scheduler gives the job GPUs",
            )
        return warning("none: the ranks use the CPU", "use a machine with GPUs, if a GPU is expected")
    if subject.world.local_rank >= torch.cuda.device_count():
        return failure(
            f"rank {subject.world.local_rank} of this node has no GPU: torch sees {torch.cuda.device_count()}",
            "start one rank per GPU of a node (cluster.ranks_per_node)",
        )
    free, whole = torch.cuda.mem_get_info(subject.device)
    message = f"{gpu_name(subject)}, driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl_version()}"
    if free < FREE_SHARE * whole:
        return warning(
            f"{message}; {(whole - free) / 1e9:.0f} of {whole / 1e9:.0f} GB are in use",
            "find the other process with nvidia-smi",
        )
    return ok(f"{message}, {whole / 1e9:.0f} GB")


def bf16(subject: Subject) -> Finding:
    """Check a product of bf16 matrices, and measure its speed on a GPU."""
    import torch

    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=draw).to(torch.bfloat16) for _ in range(2))
    exact = one.double() @ other.double()
    found = (one.to(subject.device) @ other.to(subject.device)).double().cpu()
    error = float((found - exact).norm() / exact.norm())
    if not error < BF16_ERROR:
        return failure(f"a product of bf16 matrices is wrong by {error:.1%}", "take this device out of service")
    if subject.device.type != "cuda":
        return ok(f"products are correct to {error:.1%}")
    rate = matrix_rate(subject.device)
    return ok(f"products are correct to {error:.1%}, at {rate / 1e12:.0f} TFLOP/s", rate=rate)


def cores(subject: Subject) -> Finding:
    """Check that each rank has cores for its tokenizer and loader."""
    usable, local = len(os.sched_getaffinity(0)), subject.world.local_world_size
    wanted = 1 + subject.config.data.threads
    message = f"{usable} for {local} rank{'s' if local > 1 else ''} on this node"
    if usable < wanted * local:
        return warning(
            f"{message}; each needs {wanted} (itself and data.threads {subject.config.data.threads})",
            "ask the scheduler for more (slurm.cpus_per_node), or prepare the rows with `lamda prepare`",
        )
    return ok(message)


def shared_memory(subject: Subject) -> Finding:
    """Check that /dev/shm, which is small in containers, has room for NCCL."""
    if subject.device.type != "cuda" or subject.world.local_world_size == 1:
        return ok("not needed: one rank per node, or no GPU")
    size = shutil.disk_usage("/dev/shm").total
    if size < SHARED_BYTES:
        return failure(f"/dev/shm holds {size / 1e6:.0f} MB", "start the container with --ipc=host or --shm-size=16g")
    return ok(f"/dev/shm holds {size / 1e9:.0f} GB")


def offload(subject: Subject) -> Finding:
    """Check that the node's memory has room for what its ranks offload, and for the copy of a save."""
    import torch

    config, world = subject.config, subject.world
    settings = ds_config.build(config, world_size=world.world_size)
    sharding = Sharding.of(settings, ranks=world.world_size)
    accumulation = settings["gradient_accumulation_steps"]
    capability = torch.cuda.get_device_capability(subject.device) if subject.device.type == "cuda" else None
    setting = MemorySetting.of(config, sharding, accumulation=accumulation, capability=capability)
    if not (offloaded := host_bytes_offloaded(setting)):
        return ok("not needed: nothing is offloaded")
    needed = world.local_world_size * (offloaded + snapshot_bytes(setting))
    available = available_memory()
    message = f"{available / 1e9:,.1f} GB of host memory are free, {needed / 1e9:,.1f} GB are needed for it"
    if available < needed:
        return failure(message, "take a node with more memory, more ranks, or a file without offload")
    return ok(message)


def compiler(subject: Subject) -> Finding:
    """Check that Triton can build its kernels for a GPU."""
    from lamda.model.attention.backends import missing_for_triton

    if subject.device.type != "cuda":
        return ok("not needed without a GPU")
    if missing := missing_for_triton():
        message, advice = f"attention kernels need {missing}", "install gcc and Python's headers on the node"
        needed = subject.config.model.attention not in ("auto", "math", "sdpa")
        return failure(message, advice) if needed else warning(message, advice)
    return ok("builds Python modules, as Triton does")


def available_memory() -> int:
    """Bytes of host memory that are free or can be freed, within the limits of this process's control groups."""
    lines = (PROC / "meminfo").read_text("utf-8").splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return max(0, min([free, *_free_in_cgroups()]))


def _free_in_cgroups() -> Iterator[int]:
    """Bytes that each limited control group of this process can still take; unused page cache does not count."""
    for line in (PROC / "self/cgroup").read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        group = root / path.strip("/")
        for folder in (each for each in (group, *group.parents) if each.is_relative_to(root)):
            for limit, usage in CGROUP_FILES:
                with suppress(OSError, ValueError):  # another version, a container's root, or the limit is "max"
                    room = int((folder / limit).read_text("ascii")) - int((folder / usage).read_text("ascii"))
                    statistics = dict(map(str.split, (folder / "memory.stat").read_text("ascii").splitlines()))
                    yield room + int(statistics["inactive_file"])


def gpu_name(subject: Subject) -> str | None:
    """The model of this rank's GPU, None without one."""
    import torch

    if not torch.cuda.is_available() or subject.world.local_rank >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_name(subject.world.local_rank)


def nccl_version() -> str | None:
    """NCCL's version, None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products on a GPU."""
    import torch

    one = torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        one @ one
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        one @ one
    torch.cuda.synchronize(device)
    return 2 * SIZE**3 * REPEATS / (time.perf_counter() - began)


CHECKS = (
    Check("gpu", "rank", gpu),
    Check("bf16", "rank", bf16),
    Check("cores", "node", cores),
    Check("shared memory", "node", shared_memory),
    Check("offload", "node", offload),
    Check("compiler", "node", compiler),
)
