"""GPUs, processor cores and shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning

FREE_SHARE = 0.9
"""Of a GPU's memory: less means that somebody else computes there."""
BF16_ERROR = 0.02
SIZE, REPEATS = 4096, 20
SHARED_BYTES = 1 << 30


def gpu(subject: Subject) -> Finding:
    """That this rank has a GPU, and has it alone."""
    import torch

    driver = driver_version()
    if not torch.cuda.is_available():
        if driver:
            return failure(
                f"nvidia-smi shows driver {driver}, but torch {torch.__version__} sees no GPU",
                "install a torch for CUDA, and see that the scheduler gives the job GPUs",
            )
        return warning("none: the ranks compute on the CPU", "start on a machine with GPUs, if there should be one")
    if subject.world.local_rank >= torch.cuda.device_count():
        return failure(
            f"rank {subject.world.local_rank} of this node would need a GPU more than the "
            f"{torch.cuda.device_count()} that torch sees",
            "start as many ranks a node as it has GPUs (cluster.ranks_per_node)",
        )
    free, whole = torch.cuda.mem_get_info(subject.device)
    told = f"{gpu_name(subject)}, driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl_version()}"
    if free < FREE_SHARE * whole:
        return warning(
            f"{told}; {(whole - free) / 1e9:.0f} of {whole / 1e9:.0f} GB are taken",
            "see with nvidia-smi who else computes there",
        )
    return ok(f"{told}, {whole / 1e9:.0f} GB")


def bf16(subject: Subject) -> Finding:
    """That a product of bf16 matrices is right, and on a GPU how fast."""
    import torch

    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=draw).to(torch.bfloat16) for _ in range(2))
    exact = one.double() @ other.double()
    found = (one.to(subject.device) @ other.to(subject.device)).double().cpu()
    error = float((found - exact).norm() / exact.norm())
    if not error < BF16_ERROR:
        return failure(f"a product of bf16 matrices is wrong by {error:.1%}", "take this device out of service")
    if subject.device.type != "cuda":
        return ok(f"products are right to {error:.1%}")
    rate = matrix_rate(subject.device)
    return ok(f"products are right to {error:.1%}, at {rate / 1e12:.0f} TFLOP/s", rate=rate)


def cores(subject: Subject) -> Finding:
    """That the scheduler leaves each rank cores for its tokenizer and loader."""
    usable, local = len(os.sched_getaffinity(0)), subject.world.local_size
    wanted = 1 + subject.config.data.threads
    told = f"{usable} for {local} rank{'s' if local > 1 else ''} of this node"
    if usable < wanted * local:
        return warning(
            f"{told}; each wants {wanted} (itself and data.threads {subject.config.data.threads})",
            "ask the scheduler for more (slurm.cpus_per_node), or make the blocks ahead with `lamda prepare`",
        )
    return ok(told)


def shared_memory(subject: Subject) -> Finding:
    """That NCCL finds room in /dev/shm, which containers keep small."""
    if subject.device.type != "cuda" or subject.world.local_size == 1:
        return ok("not needed: one rank a node, or no GPU")
    size = shutil.disk_usage("/dev/shm").total
    if size < SHARED_BYTES:
        return failure(f"/dev/shm holds {size / 1e6:.0f} MB", "start the container with --ipc=host or --shm-size=16g")
    return ok(f"/dev/shm holds {size / 1e9:.0f} GB")


def compiler(subject: Subject) -> Finding:
    """That Triton can build its kernels on a GPU."""
    if subject.device.type != "cuda":
        return ok("not needed without a GPU")
    if not (found := next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)):
        told, advice = "there is none, and Triton builds its kernels with one", "install gcc on the node"
        needed = subject.config.model.attention not in ("math", "sdpa")
        return failure(told, advice) if needed else warning(told, advice)
    return ok(found)


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (answer.stdout.split() or [None])[0] if answer.returncode == 0 else None


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


def matrix_rate(device: object) -> float:
    """FLOP/s of large bf16 products on a GPU."""
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
    Check("compiler", "node", compiler),
)
