"""Ranks: this process among all, and the few collectives that the project needs.

The only file that reads launcher variables. Torch is imported where it is used, so that a wrong configuration is
reported before anything heavy is imported.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from lamda.config.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

JOIN_SECONDS = 600.0  # how long a rank waits for the others to join; PyTorch's default is half an hour


class ReportedElsewhereError(UserError):
    """An error that rank 0 reports; this rank only exits."""


class FailedElsewhereError(RunError):
    """A failure that rank 0 reports; this rank only exits."""


@dataclass(frozen=True)
class World:
    """This process among all of the run. ends_at: the scheduler's time limit, in seconds of the epoch."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False
    ends_at: float | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and reports for all."""
        return self.rank == 0


def read_world() -> World:
    """The rank that the launcher (DeepSpeed, torchrun) gave this process, or a world of one rank.

    Raises UserError if its variables are wrong, such as `RANK=$SLURM_PROCID` outside of SLURM.
    """
    variables = os.environ
    size = _variable("WORLD_SIZE", 1, least=1)
    rank, local_rank = _variable("RANK", 0), _variable("LOCAL_RANK", 0)
    if rank >= size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: ranks count from 0; start with torchrun or deepspeed")
    local_size = "LOCAL_SIZE" if variables.get("LOCAL_SIZE") else "LOCAL_WORLD_SIZE"
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=size,
        local_world_size=_variable(local_size, size, least=1) if variables.get(local_size) else size,
        launched="LOCAL_RANK" in variables,
        ends_at=float(end) if (end := variables.get("SLURM_JOB_END_TIME")) else None,
    )


def _variable(name: str, default: int, *, least: int = 0) -> int:
    """A launcher's variable. Raises UserError where it is no number, or less than `least`."""
    given = os.environ.get(name, str(default))
    if not given.strip().isdecimal() or int(given) < least:
        raise UserError(
            f"{name} is {given!r} in the environment, not a number of at least {least}: unset what no launcher set, "
            "or start with torchrun or deepspeed"
        )
    return int(given)


def rank_variables(world: World, address: str) -> dict[str, str]:
    """The launcher's variables of a process that becomes the rank `world`; address: `host:port` of rank 0."""
    host, _, port = address.rpartition(":")
    variables = {
        "RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.world_size,
        "LOCAL_SIZE": world.local_world_size, "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": host, "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": False,  # torchrun's own ranks meet in its agent, these do not
    }  # fmt: skip
    return {name: str(value) for name, value in variables.items()}


@dataclass(frozen=True)
class Launcher:
    """The processes that started this one: (child, parent) as they were then.

    The parent, and for DeepSpeed the command that the user typed, which started the parent. A run
    without a launcher belongs to nobody: it may outlive its shell.
    """

    links: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, world: World) -> Launcher:
        """The launcher of this process as it is now."""
        if not world.launched:
            return cls()
        parent = os.getppid()
        links = [(os.getpid(), parent)]
        with suppress(OSError):
            if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
                links.append((parent, _parent_of(parent)))
        return cls(tuple(links))

    def is_gone(self) -> bool:
        """Whether any of them has ended since (its child then belongs to another process)."""
        return any(_parent_of(child) != parent for child, parent in self.links)


def _parent_of(pid: int) -> int:
    """The parent's process id, 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return os.getppid() if pid == os.getpid() else 0
    return int(text.rpartition(")")[2].split()[1])


def choose_accelerator() -> None:
    """Set DeepSpeed's accelerator to the CPU if there is no GPU: otherwise it warns on every rank."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(world: World, *, threads: int | None) -> torch.device:
    """Join the process group; returns this rank's device. threads: CPU threads, by default a share of the cores."""
    # Its C++ operator is only for inference, and building it takes a minute at the first start.
    import deepspeed.ops
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    with _joining(world, threads):
        deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=30), dist_init_required=True)
    if torch.cuda.is_available():
        _keep_segments()
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    return torch.device("cpu")


def start_hosts(world: World, *, threads: int | None, address: str | None = None) -> None:
    """Join a process group of the hosts, for a framework whose devices have their own collectives.

    address: `host:port` where rank 0 listens; by default what the launcher says.
    """
    import torch.distributed as dist

    with _joining(world, threads):
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{address}" if address else "env://",
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(minutes=30),
        )


def free_address() -> str:
    """A free `host:port` of this machine under the address by which other hosts reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 9))  # sends nothing
            host = way.getsockname()[0]
        except OSError:
            host = "127.0.0.1"
    return f"{host}:{free_port(host)}"


def free_port(host: str = "127.0.0.1") -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def _keep_segments() -> None:
    """Let PyTorch grow GPU memory segments unless the user has configured them: fixed ones fragment."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def exit_after(waiting: str, world: World, *, seconds: float = JOIN_SECONDS) -> Iterator[None]:
    """Exit with code 1 and a message of what was waited for if the block takes longer than `seconds`."""

    def give_up() -> None:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"rank {world.rank} of {world.world_size} (host {socket.gethostname()}) has waited {seconds:g} s {waiting} "
            f"(rank 0 listens on {place}); a rank that does not say this is missing, or the network to it is cut",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _joining(world: World, threads: int | None) -> Iterator[None]:
    """The ranks join within JOIN_SECONDS. Raises RunError if they cannot: another attempt may succeed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    if world.world_size == 1:  # perhaps without a launcher, which would set these
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            os.environ.setdefault(name, value)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        with exit_after("for all ranks to come", world):
            yield
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise RunError(
                f"{place} is in use by another process, so that the ranks cannot meet there. Give the launcher another "
                "port (deepspeed --master_port PORT, torchrun --master_port PORT), or end that process"
            ) from error
        raise RunError(f"the ranks cannot meet at {place}: {str(error).splitlines()[0]}") from error


def stop() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value on all ranks."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    import torch.distributed as dist

    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; every rank gets its result, or ends with its UserError or RunError."""
    result, failure = _attempt(action) if world.is_main_process else (None, None)
    result, elsewhere = broadcast((result, None if failure is None else _elsewhere(failure)))
    if failure is not None:
        raise failure
    if elsewhere is not None:
        raise elsewhere("rank 0 reports the reason")
    return cast("T", result)


def agree(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank; a UserError or RunError on any of them ends all ranks and is reported once."""
    result, failure = _attempt(action)
    local = None if failure is None else (_elsewhere(failure), type(failure), str(failure))
    first = next((each for each in gather(local) if each is not None), None)
    if first is None:
        return cast("T", result)
    elsewhere, kind, message = first
    raise (kind if world.is_main_process else elsewhere)(message)


def _attempt(action: Callable[[], T]) -> tuple[T | None, UserError | RunError | None]:
    try:
        return action(), None
    except (UserError, RunError) as error:
        return None, error


def _elsewhere(failure: UserError | RunError) -> type[ReportedElsewhereError | FailedElsewhereError]:
    """The exception of the ranks that do not report a failure."""
    return ReportedElsewhereError if isinstance(failure, UserError) else FailedElsewhereError


def minority_ranks(copies: list[int]) -> list[int]:
    """The ranks whose hash is not the most frequent one; all ranks where two hashes are equally frequent."""
    (most, votes), *others = Counter(copies).most_common()
    if others and others[0][1] == votes:
        return list(range(len(copies)))
    return [rank for rank, copy in enumerate(copies) if copy != most]
