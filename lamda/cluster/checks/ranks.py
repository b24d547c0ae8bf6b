"""Checks across ranks: same environment, synchronized clocks, shared run directory, all-reduce."""

from __future__ import annotations

import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from lamda.cluster.checks.environment import judge_skew
from lamda.cluster.checks.finding import Finding, Subject, failure, ok, warning
from lamda.cluster.checks.hardware import gpu_name, nccl_version
from lamda.cluster.checks.software import installed, requirements
from lamda.distributed import barrier, broadcast, gather
from lamda.model.counts import parameters
from lamda.training.provenance import code_digest, driver_version

SHARED_SECONDS = 5.0
"""Time for a file to become visible on other nodes."""
GPU_BYTES, CPU_BYTES, REPEATS = 1 << 28, 1 << 24, 5
SLOW = 10e9
"""Bytes per second of an all-reduce between GPUs; below this the fast network is probably not used."""


def facts(subject: Subject) -> dict[str, str]:
    """Values that must be equal on all ranks, by name."""
    packages = {each.name: installed(each.name) for each in requirements()}
    return {
        "code": code_digest(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: str(version) for name, version in packages.items()},
        "gpu": str(gpu_name(subject)),
        "driver": str(driver_version()),
        "NCCL": str(nccl_version()),
    }


def same_facts(everyone: Sequence[dict[str, str]], places: Sequence[str]) -> Finding:
    """Compare the facts of all ranks; places: rank and host of each."""
    found = []
    for name in everyone[0]:
        values = [facts[name] for facts in everyone]
        (usual, often), *others = Counter(values).most_common()
        if others:
            differing = [f"{place} has {value}" for place, value in zip(places, values, strict=True) if value != usual]
            found.append(f"{name}: {_few(differing)}, {often} of {len(values)} ranks {usual}")
    if found:
        return failure("; ".join(found), "give all nodes the same environment")
    return ok(f"all {len(everyone)} ranks have the same code, packages, GPUs and drivers")


def clocks(times: Sequence[float], places: Sequence[str]) -> Finding:
    """Compare clocks; times: of all ranks at the same moment."""
    middle = median(times)
    skews = [(moment - middle, place) for moment, place in zip(times, places, strict=True)]
    worst, place = max(skews, key=lambda skew: abs(skew[0]))
    finding = judge_skew(worst, f"{place} differs by {worst:+.1f} s from the others")
    return finding or ok(f"all within {max(times) - min(times):.1f} s")


def shared_directory(seen: Sequence[bool], places: Sequence[str], run: str) -> Finding:
    """Check that all ranks saw a file that rank 0 wrote into the run directory."""
    blind = [place for place, saw in zip(places, seen, strict=True) if not saw]
    if blind:
        return failure(
            f"{_few(blind)} did not see a file that {places[0]} wrote into {run}",
            "choose a run.dir on a file system that all nodes mount at the same path",
        )
    return ok(f"all {len(seen)} ranks see {run}")


def bandwidth(rate: float, *, right: bool, subject: Subject) -> Finding:
    """Check the result and the speed of an all-reduce; rate: bytes per second over each link."""
    size = subject.world.world_size
    if not right:
        return failure("an all-reduce gave a wrong sum", "see which node `run.weight_check_every` names in a run")
    whole = parameters(subject.config.model) * 4 * 2 * (size - 1) / size / rate
    message = f"{rate / 1e9:,.2f} GB/s over {size} ranks; fp32 gradients of this model take {whole:,.2f} s per step"
    if subject.device.type == "cuda" and rate < SLOW:
        advice = "NCCL_DEBUG=INFO shows which network is used, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose one"
        return replace(warning(message, advice), rate=rate)
    return ok(message, rate=rate)


def check(subject: Subject) -> dict[str, Finding]:
    """Run all checks, on every rank together."""
    place = f"rank {subject.world.rank} (host {socket.gethostname()})"
    places = gather(place)
    everyone = gather(facts(subject))
    barrier()
    times = gather(time.time())
    seen = gather(_sees_the_file(subject))
    rate, right = all_reduce(subject)
    return {
        "same": same_facts(everyone, places),
        "clocks": clocks(times, places),
        "shared": shared_directory(seen, places, subject.config.run.dir),
        "all-reduce": bandwidth(rate, right=all(gather(right)), subject=subject),
    }


def all_reduce(subject: Subject) -> tuple[float, bool]:
    """Bytes per second over each link in a large all-reduce, and whether the sum was correct."""
    import torch
    import torch.distributed as dist

    on_gpu, size, spent = subject.device.type == "cuda", subject.world.world_size, 0.0
    settle: Callable[[], object] = partial(torch.cuda.synchronize, subject.device) if on_gpu else lambda: None
    tensor = torch.empty((GPU_BYTES if on_gpu else CPU_BYTES) // 4, device=subject.device)
    for repeat in range(REPEATS + 1):
        tensor.fill_(subject.world.rank + 1)
        settle()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        settle()
        if repeat:  # the first one sets up connections
            spent += time.perf_counter() - began
    right = bool((tensor == size * (size + 1) / 2).all())
    return tensor.nbytes * 2 * (size - 1) / size * REPEATS / spent, right


def _sees_the_file(subject: Subject) -> bool:
    """Whether this rank sees the file that rank 0 writes, within SHARED_SECONDS."""
    nonce = broadcast(secrets.token_hex(8))
    file = Path(subject.config.run.dir) / f".shared-{nonce}"
    if subject.world.is_main_process:
        file.write_text(nonce, "utf-8")
    barrier()
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = file.exists() and file.read_text("utf-8") == nonce
    barrier()
    if subject.world.is_main_process:
        file.unlink()
    return seen


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
