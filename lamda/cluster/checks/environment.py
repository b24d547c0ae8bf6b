"""What a run reads from and writes to: its directory, its text, W&B, and the clocks that these go by."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import RunError, UserError
from lamda.model.counts import parameters
from lamda.storage.lock import STALE_SECONDS
from lamda.storage.run_directory import RunDirectory

Answer = TypeVar("Answer")

PATIENCE = 60.0
"""Seconds that a server has to answer."""
WRITTEN_BYTES, WRITING_SECONDS = 1 << 28, 5.0
"""The writing speed is that of the first of these that comes."""
SKEW_WARNING, SKEW_FAILURE = 2.0, STALE_SECONDS / 2
"""Seconds between clocks; a lock counts as given up after STALE_SECONDS."""


def batch(subject: Subject) -> Finding:
    """That the ranks can share the batch, and DeepSpeed's file is right."""
    config, size = subject.config, subject.world.size
    accumulation = micro_batches_per_rank(config.train, world=size)
    ds_config.build(config, world=size)
    train = config.train
    return ok(
        f"{train.global_batch_size} rows a step = {size} ranks x {train.micro_batch_size} rows x {accumulation} "
        "micro-batches"
    )


def space(subject: Subject) -> Finding:
    """That the run directory can be written to, and has room for the checkpoints."""
    run, keep = Path(subject.config.run.dir), subject.config.checkpoint.keep
    RunDirectory(run).create()
    size, free = checkpoint_bytes(subject), shutil.disk_usage(run).free
    told = f"{free / 1e9:,.0f} GB free in {run}, a checkpoint has {size / 1e9:,.2f} GB"
    if free < 1.2 * size:
        return failure(told, "choose another run.dir")
    if free < 1.2 * size * (keep + 1):
        return warning(f"{told}, and checkpoint.keep is {keep}", "make room, or lower checkpoint.keep")
    return ok(told)


def speed(subject: Subject) -> Finding:
    """How fast this rank writes, while the others write as well, as they do in a save."""
    rate = writing_rate(Path(subject.config.run.dir))
    seconds = checkpoint_bytes(subject) / (rate * subject.world.size)
    told = f"{rate / 1e6:,.0f} MB/s a rank; a checkpoint takes {seconds:,.1f} s"
    margin = subject.config.run.stop_margin_seconds
    if seconds > margin:
        return warning(
            f"{told}, more than a run has at its time limit (run.stop_margin_seconds {margin:g} s)",
            "raise run.stop_margin_seconds, or choose a run.dir on a faster file system",
        )
    return ok(told)


def file_clock(subject: Subject) -> Finding:
    """That the file server's clock and this node's agree, by which locks are judged."""
    probe = Path(subject.config.run.dir) / f".clock-{subject.world.rank}"
    probe.touch()
    skew = probe.stat().st_mtime - time.time()
    probe.unlink()
    told = f"the file server's clock is {skew:+.1f} s from this node's"
    advice = "let all machines keep time with NTP or chrony"
    if abs(skew) > SKEW_FAILURE:
        return failure(told, advice)
    return warning(told, advice) if abs(skew) > SKEW_WARNING else ok(told)


def data(subject: Subject) -> Finding:
    """That the corpus is found, and its first line can be read."""
    from lamda.data.corpus import open_corpus
    from lamda.data.files import read_lines

    def look() -> tuple[int, int, str]:
        lanes = open_corpus(subject.config.data).lanes
        files = {share.file.url: share.file for lane in lanes for share in lane.shares}
        first = next(iter(files.values()))
        if not first.url.endswith(".parquet"):
            next(read_lines(first))
        return len(files), sum(file.size for file in files.values()), first.url

    try:
        number, size, first = _in_time(look)
    except (UserError, RunError, OSError) as error:
        return failure(str(error), "mend data.corpus or data.files; behind a proxy, set https_proxy")
    return ok(f"{number} files, {size / 1e9:,.2f} GB stored; the first, {first}, can be read")


def weights_and_biases(subject: Subject) -> Finding:
    """That the mirror can be sent; training never waits for it."""
    from lamda.training.wandb_logger import is_installed, mirror_mode, sign_in

    mode = mirror_mode(subject.config)
    if mode != "disabled" and not is_installed():
        return warning("the package is not installed: nothing is mirrored", "pip install wandb, or wandb.mode disabled")
    if mode != "online":
        origin = "wandb.mode" if mode == subject.config.wandb.mode else "WANDB_MODE"
        return ok(f"{origin} is {mode}")
    import wandb

    advice = "rows are kept in RUN/wandb for `wandb sync`; wandb.mode offline says that this is meant"
    try:
        host = sign_in()
    except wandb.errors.Error as error:
        return warning(str(error), advice)
    try:
        _in_time(lambda: reach(host))
    except OSError as error:
        return warning(f"{host} cannot be reached ({error})", advice)
    return ok(f"{host} answers, and there is a key for it")


def checkpoint_bytes(subject: Subject) -> int:
    """Of one checkpoint: weights as computed with, and for each parameter three fp32 numbers of the optimiser."""
    own = ds_config.build(subject.config, world=subject.world.size)
    return parameters(subject.config.model) * ((2 if ds_config.is_bf16(own) else 4) + 12)


def writing_rate(folder: Path) -> float:
    """Bytes a second that reach the disk. Raises OSError."""
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


def reach(address: str) -> None:
    """Raises OSError where no server answers; what it answers does not matter."""
    try:
        with urlopen(address, timeout=PATIENCE):
            pass
    except HTTPError:
        pass


def _in_time(look: Callable[[], Answer]) -> Answer:
    """The answer of something that may wait for ever. Raises TimeoutError after PATIENCE, and what `look` raises."""
    box: list[Answer | BaseException] = []

    def run() -> None:
        try:
            box.append(look())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not box:
        raise TimeoutError(f"no answer for {PATIENCE:g} s")
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


CHECKS = (
    Check("batch", "main", batch),
    Check("run directory", "main", space),
    Check("disk speed", "rank", speed),
    Check("file clock", "node", file_clock),
    Check("data", "node", data),
    Check("wandb", "main", weights_and_biases),
)
