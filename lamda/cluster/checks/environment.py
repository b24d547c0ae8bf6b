"""Run directory, disk, training text, W&B, the mirror, and clocks."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

from lamda.best_effort import reason_of
from lamda.cluster import estimates
from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import RunError, UserError
from lamda.engines.deepspeed.framework import require_valid
from lamda.model.counts import parameters
from lamda.storage.lock import STALE_SECONDS
from lamda.storage.run_directory import RunDirectory

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0
"""For servers to answer."""
WRITTEN_BYTES, WRITING_SECONDS = 1 << 28, 5.0
"""The write test ends at the first of these."""
SKEW_WARNING, SKEW_FAILURE = 2.0, STALE_SECONDS / 2
"""Clock skew in seconds; a lock is stale after STALE_SECONDS."""


def batch(subject: Subject) -> Finding:
    """Check that the ranks can share the batch, and the DeepSpeed file."""
    config, size = subject.config, subject.world.world_size
    accumulation = micro_batches_per_rank(config.train, world_size=size)
    ds_config.build(config, world_size=size)
    require_valid(config)
    train = config.train
    return ok(
        f"{train.global_batch_size} rows per step = {size} ranks x {train.micro_batch_size} rows x {accumulation} "
        "micro-batches"
    )


def free_space(subject: Subject) -> Finding:
    """Check that the run directory is writable and has room for the checkpoints."""
    run, keep = Path(subject.config.run.dir), subject.config.checkpoint.keep
    RunDirectory(run).create()
    size, free = checkpoint_bytes(subject), shutil.disk_usage(run).free
    message = f"{free / 1e9:,.0f} GB free in {run}, a checkpoint takes {size / 1e9:,.2f} GB"
    if free < 1.2 * size:
        return failure(message, "choose another run.dir")
    if free < 1.2 * size * (keep + 1):
        return warning(f"{message}, and checkpoint.keep is {keep}", "free disk space, or lower checkpoint.keep")
    return ok(message)


def write_speed(subject: Subject) -> Finding:
    """Measure how fast this rank writes while all ranks write, as in a save."""
    run = RunDirectory(Path(subject.config.run.dir))
    run.create()  # not left to `free_space`: that check runs on another rank, which may be slower
    rate = writing_rate(run.path)
    seconds = checkpoint_bytes(subject) / (rate * subject.world.world_size)
    message = f"{rate / 1e6:,.0f} MB/s per rank; a checkpoint takes {seconds:,.1f} s"
    margin = subject.config.run.stop_margin_seconds
    if seconds > margin:
        return warning(
            f"{message}, more than run.stop_margin_seconds ({margin:g} s)",
            "raise run.stop_margin_seconds, or choose a run.dir on a faster file system",
        )
    return ok(message)


def file_clock(subject: Subject) -> Finding:
    """Compare the clock of the file server, which decides whether locks are stale, with this node's."""
    probe = Path(subject.config.run.dir) / f".clock-{subject.world.rank}"
    probe.touch()
    skew = probe.stat().st_mtime - time.time()
    probe.unlink()
    message = f"the file server's clock differs by {skew:+.1f} s from this node's"
    return judge_skew(skew, message) or ok(message)


def judge_skew(skew: float, message: str) -> Finding | None:
    """The finding about a clock that differs by `skew` seconds, None if the difference is small enough."""
    if abs(skew) <= SKEW_WARNING:
        return None
    return (failure if abs(skew) > SKEW_FAILURE else warning)(message, "synchronize all clocks with NTP or chrony")


def data(subject: Subject) -> Finding:
    """Check that the corpus exists and that its first line can be read."""
    from lamda.data.corpus import open_corpus
    from lamda.data.files import read_lines

    def open_first() -> tuple[int, int, str]:
        lanes = open_corpus(subject.config.data).lanes
        files = {each.file.url: each.file for lane in lanes for each in lane.slices}
        first = next(iter(files.values()))
        if not first.is_indexed:
            next(read_lines(first))
        return len(files), sum(file.size for file in files.values()), first.url

    try:
        number, size, first = _with_timeout(open_first)
    except (UserError, RunError, OSError) as error:
        return failure(str(error), "fix data.corpus or data.files; behind a proxy, set https_proxy")
    return ok(f"{number} files, {size / 1e9:,.2f} GB stored; the first, {first}, can be read")


def weights_and_biases(subject: Subject) -> Finding:
    """Check that W&B logging works; training never waits for it."""
    from lamda.training.wandb_logger import is_installed, mirror_mode, sign_in

    mode = mirror_mode(subject.config)
    if mode != "disabled" and not is_installed():
        return warning(
            "the package is not installed: nothing is logged to W&B", "pip install wandb, or wandb.mode disabled"
        )
    if mode != "online":
        origin = "wandb.mode" if mode == subject.config.wandb.mode else "WANDB_MODE"
        return ok(f"{origin} is {mode}")
    import wandb

    advice = "rows stay in RUN/wandb for `wandb sync`; set wandb.mode offline if this is intended"
    try:
        host = sign_in()
    except wandb.errors.Error as error:
        return warning(str(error), advice)
    try:
        _with_timeout(lambda: require_answer(host))
    except OSError as error:
        return warning(f"{host} cannot be reached ({error})", advice)
    return ok(f"{host} is reachable, and an API key is set")


def mirror(subject: Subject) -> Finding:
    """Check that the mirror of the checkpoints can be read and written: a small file, removed again."""
    from lamda.storage.mirror import Mirror

    address = subject.config.checkpoint.mirror
    if address is None:
        return ok("checkpoint.mirror is not set: checkpoints are in run.dir alone")
    directory = RunDirectory(Path(subject.config.run.dir))
    there = Mirror(address, directory.path)
    try:
        _with_timeout(lambda: there.require_own(directory))
        found = _with_timeout(there.checkpoints)
        _with_timeout(there.check)
    except UserError as error:
        return failure(*str(error).split("; ", 1))
    except Exception as error:  # of the file system's library
        return failure(
            f"{there.address} cannot be used ({reason_of(error)})", "check the address, the credentials and the network"
        )
    newest = next((name for name in reversed(found) if found[name]), "no checkpoint yet")
    return ok(f"{there.address} can be written; {newest}")


def checkpoint_bytes(subject: Subject) -> int:
    """Bytes of a checkpoint."""
    deepspeed = ds_config.build(subject.config, world_size=subject.world.world_size)
    return estimates.checkpoint_bytes(parameters(subject.config.model), width=2 if ds_config.is_bf16(deepspeed) else 4)


def writing_rate(folder: Path) -> float:
    """Bytes per second that reach the disk. Raises OSError."""
    file, chunk, written = folder / f".speed-{os.getpid()}", os.urandom(1 << 22), 0
    began = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as stream:
            while written < WRITTEN_BYTES and time.perf_counter() - began < WRITING_SECONDS:
                written += stream.write(chunk)
                os.fsync(stream.fileno())
        return written / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)


def require_answer(address: str) -> None:
    """Raises OSError if no server answers; any HTTP answer counts."""
    with suppress(HTTPError), urlopen(address, timeout=TIMEOUT_SECONDS):
        pass


def _with_timeout(action: Callable[[], T]) -> T:
    """Run an action that may hang. Raises TimeoutError after TIMEOUT_SECONDS, and what the action raises."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # an executor would wait for it at exit
    if not wait([future], TIMEOUT_SECONDS).done:
        raise TimeoutError(f"no answer for {TIMEOUT_SECONDS:g} s")
    return future.result()


CHECKS = (
    Check("batch", "main", batch),
    Check("run directory", "main", free_space),
    Check("disk speed", "rank", write_speed),
    Check("file clock", "node", file_clock),
    Check("data", "node", data),
    Check("wandb", "main", weights_and_biases),
    Check("mirror", "main", mirror),
)
