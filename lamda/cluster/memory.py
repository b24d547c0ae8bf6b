"""A rank's GPU memory by item, in each phase of a run under DeepSpeed 0.19.8.

    start      weights without values, and DeepSpeed's copy as it flattens them; at stage 3 the one being sharded
    loss       start of the backward pass: all activations, the logits and their gradient
    backward   in the last block; gradients of earlier micro-batches are there too
    reduction  gradients are reduced at the end of a step (stages 2 and 3: during backward)
    update     the optimizer step

A rank needs the maximum of the five. These are closed forms; the tests compare them with live tensors.

Activations are the tensors that PyTorch saves for the backward pass on a GPU. A compiled block saves three of the four
of width F, and recomputes the other. Activation checkpointing keeps a block's input (`block`), or everything except
what the feed-forward half computes from its input (`ffn`), and recomputes the rest one block at a time.
Dimensions: see `lamda/model/decoder.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Literal, assert_never, get_args

from lamda.cluster.zero import Sharding
from lamda.config import ModelConfig
from lamda.config.schema import Backend, Config, OptimizerName, Recompute
from lamda.engines.deepspeed.compile import is_worthwhile
from lamda.model.backend_choice import Target, resolve
from lamda.model.weights import is_matrix, param_group_of, weight_shapes

Phase = Literal["start", "loss", "backward", "reduction", "update"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP = PHASES[1:]
COMPUTING: tuple[Phase, ...] = ("loss", "backward")
_REDUCED = 500_000_000
"""Elements after which the engine reduces its bucket, at stage 0."""
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
WIDE_ROWS = 256
"""Rows of logits that the loss converts to fp32 at a time (`lamda.model.loss`)."""
TILE = 128
"""Queries per tile in the backward pass of `sdpa` (`lamda.model.attention.sdpa`)."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch.

    kept: saved from forward to backward. logits: with their gradient, at the loss. block: the most that the
    backward pass of the last block adds to `kept`.
    """

    kept: int
    logits: int
    block: int

    @property
    def peak(self) -> int:
        """The maximum at any time."""
        return self.kept + max(self.logits, self.block)


@dataclass(frozen=True)
class MemoryItem:
    """Bytes on a rank's GPU, and the phases in which they are allocated.

    is_state: whether they are model state (weights, gradients, optimizer state), not buffers or activations.
    """

    name: str
    bytes: int
    phases: Sequence[Phase]
    is_state: bool = False


@dataclass(frozen=True)
class MemorySetting:
    """The settings that memory depends on. attention: the backend, whatever `model.attention` says."""

    model: ModelConfig
    attention: Backend
    sharding: Sharding
    rows: int
    length: int
    accumulation: int
    recompute: Recompute = "none"
    has_documents: bool = False
    optimizer: OptimizerName = "adamw"
    is_compiled: bool = False

    @classmethod
    def of(
        cls, config: Config, sharding: Sharding, *, accumulation: int, capability: tuple[int, int] | None
    ) -> MemorySetting:
        """The settings of a run on GPUs of this compute capability; None: not on GPUs.

        Raises UserError if attention cannot run there.
        """
        target = Target(capability, sharding.weight, config.model.d_head)
        attention = resolve(config.model.attention, target, training=True)
        rows, length = config.train.micro_batch_size, config.data.sequence_length
        recompute, has_documents = config.train.recompute, config.data.separates_documents
        optimizer = config.train.optimizer
        return cls(
            config.model,
            attention,
            sharding,
            rows,
            length,
            accumulation,
            recompute,
            has_documents,
            optimizer,
            is_compiled=is_worthwhile(config, "cuda", stage=sharding.stage),
        )


def parameter_sizes(model: ModelConfig) -> list[int]:
    """Elements of every parameter, in the order of the module."""
    return [prod(shape) for shape in weight_shapes(model).values()]


def items(setting: MemorySetting) -> list[MemoryItem]:
    """The nonempty items in a rank's GPU memory."""
    sizes = parameter_sizes(setting.model)
    parts = (_states(sizes, setting), _gradients(sizes, setting), _buffers(sizes, setting), _activations(setting))
    return [item for item in chain(*parts) if item.bytes and item.phases]


def by_phase(found: Sequence[MemoryItem]) -> dict[Phase, int]:
    """Bytes in each phase."""
    return {phase: sum(item.bytes for item in found if phase in item.phases) for phase in PHASES}


def peak(setting: MemorySetting) -> int:
    """Bytes that a rank needs."""
    return max(by_phase(items(setting)).values())


def model_states(found: Sequence[MemoryItem]) -> int:
    """Bytes of weights, optimizer state and gradients after the last backward pass of a step."""
    return sum(item.bytes for item in found if item.is_state)


def optimizer_state(model: ModelConfig, optimizer: OptimizerName) -> int:
    """fp32 elements that an optimizer keeps besides the weights (`lamda.engines.deepspeed.optimizer.fresh_state`)."""
    kept = 0
    for name, shape in weight_shapes(model).items():
        numel = prod(shape)
        match optimizer:
            case "adamw":
                kept += 2 * numel
            case "muon":
                kept += numel if is_matrix(name) else 2 * numel
            case "adafactor":
                kept += sum(shape)
            case _:
                assert_never(optimizer)
    return kept


def snapshot_bytes(setting: MemorySetting) -> int:
    """Pinned host memory of rank 0 for a checkpoint: its optimizer state, and the model's weights."""
    sharding, total = setting.sharding, sum(parameter_sizes(setting.model))
    state = total + optimizer_state(setting.model, setting.optimizer)
    return 4 * (sharding.share(state) if sharding.stage else state) + sharding.weight * total


def _states(sizes: Sequence[int], setting: MemorySetting) -> Iterator[MemoryItem]:
    """Weights and optimizer state, which stay for the whole run."""
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    kept = optimizer_state(setting.model, setting.optimizer)
    small = sum(size for size in sizes if size < sharding.persistent)
    shard = sharding.share(total) if sharding.stage else total
    has_masters = sharding.stage or sharding.is_bf16
    if not sharding.offloads_weights:
        yield _state("weights", (shard if sharding.stage == 3 else total) * width, PHASES)
    yield MemoryItem("weights being flattened", _flattened(setting.model, sharding) * width, ("start",))
    yield MemoryItem("a weight before it is sharded", max(sizes) * (4 + width) * (sharding.stage == 3), ("start",))
    if sharding.stage == 3 and sharding.ranks > 1:
        yield _state("small weights, kept whole", small * width, STEP)
        yield MemoryItem("weights, gathered", min(total - small, sharding.live) * width, COMPUTING)
        second = -(-total // sharding.secondary) * width if sharding.secondary > 1 else 0
        yield _state("weights, second copy", second, ("start", *COMPUTING, "reduction"))
    if sharding.offloads_optimizer:
        return
    yield _state("fp32 master weights", 4 * shard if has_masters else 0, STEP)
    yield _state("optimizer state", 4 * (sharding.share(kept) if sharding.stage else kept), STEP)


def _flattened(model: ModelConfig, sharding: Sharding) -> int:
    """Elements that DeepSpeed copies together: a parameter group at stages 1 and 2; at stage 3 it does on the host."""
    by_group: Counter[str] = Counter()
    for name, shape in weight_shapes(model).items():
        by_group[param_group_of(name)] += prod(shape)
    return max(by_group.values()) if sharding.stage in (1, 2) else 0


def host_bytes_at_start(setting: MemorySetting) -> int:
    """A rank's most: a weight as it is drawn, or at stage 3 its shard, which DeepSpeed flattens on the host."""
    sizes, sharding = parameter_sizes(setting.model), setting.sharding
    flattened = sharding.share(sum(sizes)) * sharding.weight if sharding.stage == 3 else 0
    return max(flattened, 4 * max(sizes))


def host_bytes_offloaded(setting: MemorySetting) -> int:
    """A rank's masters, moments, fp32 and accumulated gradients, and weights or DeepSpeed's copy of them (stage 2)."""
    sharding, shard = setting.sharding, setting.sharding.share(sum(parameter_sizes(setting.model)))
    weights = sharding.width_on_host * shard
    if not sharding.offloads_optimizer:
        return weights
    return weights + (4 + 8 + 4 + sharding.accumulated) * shard


def _gradients(sizes: Sequence[int], setting: MemorySetting) -> Iterator[MemoryItem]:
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    shard = sharding.share(total)
    embedding = setting.model.vocab_size * setting.model.d_model
    # The tied embedding's first gradient waits for the second during the whole backward pass.
    yield MemoryItem("gradients being computed", (embedding + max(sizes)) * width, ("backward",))
    # With one micro-batch per step, gradients appear as activations are freed.
    earlier: tuple[Phase, ...] = COMPUTING if setting.accumulation > 1 else ()
    if sharding.offloads_optimizer:
        # One weight's gradient comes back at a time, to be added to.
        yield MemoryItem("a gradient from the host", max(sizes) * sharding.accumulated, COMPUTING)
    elif sharding.stage == 0:
        yield _state("gradients", total * width, (*earlier, "reduction", "update"))
    elif sharding.accumulates_whole:
        gradients = 0 if sharding.frees_gradients else total * width
        yield _state("gradients", gradients, (*earlier, "reduction", "update"))
        yield _state("fp32 accumulator", 4 * total, STEP)
    elif sharding.stage == 1:
        yield _state("gradients", total * width, (*earlier, "reduction"))
        yield MemoryItem("reduced gradients", shard * width, ("reduction", "update"))
    elif sharding.stage == 2:
        is_apart = sharding.accumulated == width
        yield MemoryItem("gradients of this micro-batch", shard * width if is_apart else 0, earlier)
        yield _state("accumulated gradients", shard * sharding.accumulated, (*COMPUTING, "update"))
    else:
        yield _state("accumulated gradients", shard * sharding.accumulated, STEP)


def _state(name: str, count: int, phases: Sequence[Phase]) -> MemoryItem:
    return MemoryItem(name, count, phases, is_state=True)


def _buffers(sizes: Sequence[int], setting: MemorySetting) -> Iterator[MemoryItem]:
    """DeepSpeed's buckets, and its copies for reduction and update."""
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    shard, sent = sharding.share(total), sharding.sent
    converted = sent if sent != width else 0
    reducing: tuple[Phase, ...] = ("backward",) if sharding.stage >= 2 else ("reduction",)
    in_flight = min(sharding.bucket, total)
    if sharding.stage == 0:
        flat = min(total, _REDUCED + max(sizes))
        yield MemoryItem("copies to reduce", flat * (width + converted), reducing)
        yield MemoryItem("gradients in fp32", 4 * total if sharding.is_bf16 else 0, ("update",))
    elif sharding.accumulates_whole:
        yield MemoryItem("copies to reduce", total * (4 + (sent if sent != 4 else 0)), reducing)
    else:
        element = sent if sharding.stage == 3 else width * sharding.buckets
        phases = STEP if sharding.stage == 3 else (*COMPUTING, "reduction")
        yield MemoryItem("reduction bucket", sharding.bucket * element, phases)
        copied = width + sent + converted if sharding.stage == 3 else width + sent if converted else 0
        yield MemoryItem("copies to reduce", in_flight * copied, reducing)
        is_copied = sharding.accumulated == width and (sharding.stage < 3 or sharding.is_bf16)
        if not sharding.offloads_optimizer:
            yield MemoryItem("gradients in fp32", 4 * shard if is_copied else 0, ("update",))
            yield MemoryItem("gradient norm in fp64", 8 * min(max(sizes), shard), ("update",))


def _activations(setting: MemorySetting) -> Iterator[MemoryItem]:
    found = activations(setting)
    yield MemoryItem("activations", found.kept, COMPUTING)
    yield MemoryItem("logits and their gradient", found.logits, ("loss",))
    yield MemoryItem("a block's backward pass", found.block, ("backward",))


def activations(setting: MemorySetting) -> Activations:
    """Activations of a micro-batch."""
    model, width = setting.model, setting.sharding.weight
    D, F, V, HK = model.d_model, model.d_ff, model.vocab_size, model.n_heads * model.d_head
    scores, attention_backward = _attention(setting.attention, model, length=setting.length, width=width)
    norm = D * width + 4  # its input, and 1 / rms in fp32
    attention = norm + D * width + 4 * HK * width + scores
    feed_forward = norm + D * width + 4 * F * width
    again = F * width if setting.is_compiled and setting.sharding.stage < 3 else 0  # ZeRO stage 3 is not compiled
    layer = {"none": attention + feed_forward - again, "ffn": attention + D * width, "block": D * width}[
        setting.recompute
    ]
    ends = norm + D * width + 8 + 8 + 4  # the final norm, its output, token, target, logsumexp
    mask = setting.length if setting.has_documents and setting.attention in ("math", "sdpa") else 0
    # The feed-forward half runs backward first, and its activations are freed before attention's backward pass.
    block = max(feed_forward + 2 * F * width, attention_backward)
    block += {"none": again - feed_forward, "ffn": 0, "block": attention}[setting.recompute]
    tokens = setting.rows * setting.length
    return Activations(
        kept=tokens * (model.n_layers * layer + ends + mask),
        logits=tokens * 2 * V * width + 3 * min(WIDE_ROWS, tokens) * V * 4,
        block=tokens * block,
    )


def recomputed_flops(model: ModelConfig, *, length: int, recompute: Recompute) -> int:
    """FLOPs per token that recomputation adds to `lamda.model.counts.flops_per_token`.

    The last product of the recomputed part is left out: nothing needs its result.
    """
    D, F, HK = model.d_model, model.d_ff, model.n_heads * model.d_head
    gate_up, attention = 4 * D * F, 8 * D * HK + 2 * length * HK
    return model.n_layers * {"none": 0, "ffn": gate_up, "block": gate_up + attention}[recompute]


def _attention(backend: Backend, model: ModelConfig, *, length: int, width: int) -> tuple[int, int]:
    """Attention's bytes per token and layer beyond query, key, value and output: saved, and temporary in backward.

    `math` saves the softmax in fp32 and in the precision of the values; its backward pass holds two such. The
    kernels save a logsumexp. `sdpa` copies a gradient, sums gradients in fp32 and has five tiles of scores; among
    the kernels `split` needs most: copies of its inputs, and gradients of near and far keys.
    """
    H, HK, HL = model.n_heads, model.n_heads * model.d_head, model.n_heads * length
    match backend:
        case "math":
            return HL * (6 if width == 2 else 4), HL * (6 if width == 2 else 8)
        case "sdpa":
            return 0, HK * (width + 12) + min(TILE, length) * H * (12 + 2 * width)
        case "flex" | "fused" | "split":
            return 4 * H, 9 * HK * width
        case _:
            assert_never(backend)
