"""Estimates of `lamda plan` apart from memory: GPUs, data path, disk, and checkpoint interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path

from lamda.config.errors import nearest
from lamda.config.schema import Config
from lamda.data.card import load_card
from lamda.model.counts import PEAK_FLOPS, parameters

RESERVED_FRACTION = 0.05
"""Fraction of GPU memory for the CUDA context, NCCL and fragmentation: an assumption, not a measurement."""
EDGE_ROWS = 2
"""Rows of a batch by which a rank's part shifts over the lanes at its edges (`lamda.data.loader`)."""
CACHED_ID_BYTES, LOADED_ID_BYTES = 2, 4
"""Bytes per id in cached rows of at most 65,536 pieces, and in memory."""
DOCUMENT_BYTES, DOCUMENT_TOKENS = 300, 300
"""Assumed host memory of a document besides its ids, and tokens per document."""
OPTIMIZER_BYTES = 12
"""Bytes per parameter in the optimizer files: fp32 weight and two moments."""
MAX_NARROW_VOCABULARY = 1 << 16
"""Cached rows store ids of vocabularies up to this size in 2 bytes each."""
MIN_LANES, MAX_LANES, FIRST_TOKENS, WINDOW_ROWS, SPAN_BYTES = 8, 64, 1 << 17, 16384, 24
"""Constants of `lamda.data`, which imports numpy; `lamda plan --help` does not. A test compares them."""
GPU_HOURS_PER_FAILURE = 50_700
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Device:
    """A GPU: memory in MiB as `nvidia-smi` shows it; dense FLOP/s in bf16, and in fp32 without TF32, by its data sheet.

    capability: the compute capability. The name's gigabytes are no measure: an "80 GB" H100 has 85.5 * 10^9 bytes.
    """

    name: str
    capability: tuple[int, int]
    mebibytes: int
    bf16: float
    fp32: float

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mebibytes << 20

    @property
    def usable(self) -> int:
        """Bytes available to a run."""
        return round(self.memory * (1 - RESERVED_FRACTION))

    def peak(self, *, is_bf16: bool) -> float:
        """Peak FLOP/s of matrix products."""
        return self.bf16 if is_bf16 else self.fp32


DEVICES = {
    device.name: device
    for device in (
        Device("b200", (10, 0), 183_359, PEAK_FLOPS["B200"], 75e12),
        Device("h200", (9, 0), 143_771, PEAK_FLOPS["H200"], 67e12),
        Device("h100", (9, 0), 81_559, PEAK_FLOPS["H100"], 67e12),
        Device("a100-80", (8, 0), 81_920, PEAK_FLOPS["A100"], 19.5e12),
        Device("a100-40", (8, 0), 40_960, PEAK_FLOPS["A100"], 19.5e12),
        Device("l40s", (8, 9), 46_068, PEAK_FLOPS["L40S"], 91.6e12),
        Device("rtx4090", (8, 9), 24_564, PEAK_FLOPS["RTX 4090"], 82.6e12),
    )
}


def unknown_device(name: str) -> str:
    """The problem of a name that DEVICES lacks."""
    return f"there is no {name!r} among {', '.join(DEVICES)}{nearest(name, DEVICES)}"


@dataclass(frozen=True)
class DataRates:
    """Rates per second. rank: tokens that a rank trains on. blocks: bytes of cached rows that all ranks read.

    encoded: most tokens that a rank encodes, with the most lanes and with the fewest.
    """

    rank: float
    encoded: tuple[float, float]
    blocks: float


def data_rates(config: Config, *, ranks: int, tokens_per_second: float) -> DataRates:
    """Required data rates. A rank encodes whole lanes: with more ranks than lanes, several encode the same text."""
    most, fewest = (tokens_per_second * fraction for fraction in _encoded_fractions(config, ranks))
    return DataRates(tokens_per_second / ranks, (most, fewest), tokens_per_second * CACHED_ID_BYTES)


def loader_bytes(config: Config, *, ranks: int) -> int:
    """Host memory of a rank's rows, with the most lanes: its part of two windows. Cached rows are memory-mapped.

    One of the two may be the last of an epoch, which is up to 1.5 times as long. Documents much shorter than
    DOCUMENT_TOKENS need more.
    """
    length, shuffle = config.data.sequence_length, config.data.shuffle
    if shuffle == "epoch":
        return 0
    rows = max(shuffle if isinstance(shuffle, int) else WINDOW_ROWS, FIRST_TOKENS // length, MAX_LANES)
    bytes_per_token = LOADED_ID_BYTES + DOCUMENT_BYTES / DOCUMENT_TOKENS
    return math.ceil(2.5 * rows * (length + 1) * bytes_per_token * _encoded_fractions(config, ranks)[0])


def _encoded_fractions(config: Config, ranks: int) -> tuple[float, float]:
    """The largest fraction of the text that a rank encodes, with the most lanes and with the fewest."""
    counts = (1, 1) if config.data.shuffle == "none" else (MAX_LANES, MIN_LANES)
    most, fewest = (_lanes_of_a_rank(count, ranks, config.train.global_batch_size) / count for count in counts)
    return most, fewest


def _lanes_of_a_rank(count: int, ranks: int, batch: int) -> int:
    """The most equal lanes that a rank reads: its part of a step's rows, sorted by lane, with its edges."""
    margin = EDGE_ROWS * ranks / batch
    ends = ((count * (rank - margin) / ranks, count * (rank + 1 + margin) / ranks) for rank in range(ranks))
    return max(min(count, math.ceil(high)) - max(0, math.floor(low)) for low, high in ends)


@dataclass(frozen=True)
class DiskUse:
    """Bytes on disk. checkpoints: the most at any time. text_bytes: None if unknown."""

    checkpoint_bytes: int
    checkpoints: int
    checkpoints_bytes: int
    keeps_blocks: bool
    blocks_bytes: int
    text_bytes: int | None
    text_is_streamed: bool


def disk_use(config: Config, *, width: int) -> DiskUse:
    """What a run stores; `width` is the bytes per parameter of model.safetensors. Raises UserError."""
    one, count = checkpoint_bytes(parameters(config.model), width=width), checkpoints(config)
    return DiskUse(
        checkpoint_bytes=one,
        checkpoints=count,
        checkpoints_bytes=one * count,
        keeps_blocks=config.data.cache_dir is not None,
        blocks_bytes=block_bytes(config),
        text_bytes=text_bytes(config),
        text_is_streamed=is_streamed(config),
    )


def checkpoint_bytes(parameters: int, *, width: int) -> int:
    """A checkpoint's tensors: `width` bytes per parameter in model.safetensors, and the optimizer files."""
    return parameters * (width + OPTIMIZER_BYTES)


def checkpoints(config: Config) -> int:
    """The most checkpoints at any time, with the one being written."""
    steps, saving = config.steps, config.checkpoint
    kept = steps // math.lcm(saving.every, saving.keep_every) if saving.keep_every else 0
    return min(saving.keep + 1 + kept, -(-steps // saving.every))


def block_bytes(config: Config) -> int:
    """Cached rows of the whole run (`data.cache_dir`), one span per row; each document adds about 50 bytes."""
    width = 2 if config.model.vocab_size <= MAX_NARROW_VOCABULARY else 4
    rows = config.steps * config.train.global_batch_size
    return rows * ((config.data.sequence_length + 1) * width + SPAN_BYTES)


def text_bytes(config: Config) -> int | None:
    """Size of the stored training text, from its card or from local files; None if neither says.

    Raises UserError for a card that cannot be read.
    """
    from lamda.data.folders import LeftOut, walk  # slow to import, for `lamda plan --help`

    total = 0
    for source in load_card(config.data).sources:
        hits = [path for pattern in source.files for path in glob(pattern, recursive=True)]  # noqa: PTH207 - may be absolute
        below = (walk(path, LeftOut()) if Path(path).is_dir() else [path] for path in hits)
        found = [path for path in chain.from_iterable(below) if Path(path).is_file()]
        sizes = [checksum.size for checksum in source.checksums.values()] or [
            Path(path).stat().st_size for path in found
        ]
        if not sizes:
            return None
        total += sum(sizes)
    return total


def is_streamed(config: Config) -> bool:
    """Whether any training text is read over a network and not stored."""
    return any(
        source.dataset is not None or any("://" in pattern for pattern in source.files)
        for source in load_card(config.data).sources
    )


@dataclass(frozen=True)
class CheckpointInterval:
    """The best interval between checkpoints and the configured one, with the fraction of time that each loses."""

    gpu_hours_a_failure: int
    seconds_between_failures: float
    save_seconds: float
    best_seconds: float
    best_steps: int
    best_lost_share: float
    configured_seconds: float
    configured_steps: int
    configured_lost_share: float


def checkpoint_interval(config: Config, *, gpus: int, save_seconds: float, step_seconds: float) -> CheckpointInterval:
    """Compare `checkpoint.every` with the best interval."""
    configured = config.checkpoint.every * step_seconds
    best = best_interval(save_seconds=save_seconds, gpus=gpus)
    return CheckpointInterval(
        gpu_hours_a_failure=GPU_HOURS_PER_FAILURE,
        seconds_between_failures=seconds_between_failures(gpus),
        save_seconds=save_seconds,
        best_seconds=best,
        best_steps=max(1, round(best / step_seconds)),
        best_lost_share=lost_share(best, save_seconds=save_seconds, gpus=gpus),
        configured_seconds=configured,
        configured_steps=config.checkpoint.every,
        configured_lost_share=lost_share(configured, save_seconds=save_seconds, gpus=gpus),
    )


def seconds_between_failures(gpus: int) -> float:
    """Mean time between failures of `gpus` GPUs and their nodes."""
    return GPU_HOURS_PER_FAILURE * 3600 / gpus


def best_interval(*, save_seconds: float, gpus: int) -> float:
    """The interval, in seconds, that loses the least time to saves and failures.

    Young, A first order approximation to the optimum checkpoint interval (1974); Daly's correction (2006) is far below
    the uncertainty of the failure rate.
    """
    return math.sqrt(2 * save_seconds * seconds_between_failures(gpus))


def lost_share(interval: float, *, save_seconds: float, gpus: int) -> float:
    """Fraction of the time lost to saving every `interval` seconds and to recomputing after failures."""
    return save_seconds / interval + interval / (2 * seconds_between_failures(gpus))
