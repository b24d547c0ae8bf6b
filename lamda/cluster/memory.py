"""Memory of a rank by what holds it, in each phase of a run under DeepSpeed 0.19.8.

    start      the fp32 model that every rank makes, whole, before DeepSpeed divides it
    loss       the backward pass begins: all activations are there, the logits and their gradient
    backward   it goes through the last block; gradients of the micro-batches before are there too
    reduction  gradients go round, at the end of a step (stages 2 and 3: during backward)
    update     the optimiser's step

What a rank needs is the largest of the five. Closed forms; the tests hold them against tensors that are alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from lamda.cluster.activations import Activations, Recompute, activations
from lamda.cluster.sharding import Sharding
from lamda.config import ModelConfig
from lamda.config.schema import Config
from lamda.model.weights import is_matrix, weight_shapes

Phase = Literal["start", "loss", "backward", "reduction", "update"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP = PHASES[1:]
COMPUTING: tuple[Phase, ...] = ("loss", "backward")
_REDUCED = 500_000_000
"""Elements after which the engine reduces what it has gathered, at stage 0."""


@dataclass(frozen=True)
class Item:
    """Bytes on a rank's GPU, and the phases in which they are there.

    is_state: whether they are the model's own (weights, gradients, optimiser state), no buffer or activation.
    """

    name: str
    bytes: int
    phases: Sequence[Phase]
    is_state: bool = False


@dataclass(frozen=True)
class Setting:
    """All that memory depends on."""

    model: ModelConfig
    sharding: Sharding
    rows: int
    length: int
    accumulation: int
    recompute: Recompute = "none"
    has_documents: bool = False
    optimizer: str = "adamw"

    @classmethod
    def of(cls, config: Config, sharding: Sharding, *, accumulation: int) -> Setting:
        """The setting of a run."""
        rows, length = config.train.micro_batch_size, config.data.sequence_length
        recompute, has_documents = config.train.recompute, config.data.separates_documents
        optimizer = config.train.optimizer
        return cls(config.model, sharding, rows, length, accumulation, recompute, has_documents, optimizer)

    @property
    def activations(self) -> Activations:
        """Of a micro-batch."""
        return activations(
            self.model,
            rows=self.rows,
            length=self.length,
            width=self.sharding.weight,
            recompute=self.recompute,
            has_documents=self.has_documents,
        )


def parameter_sizes(model: ModelConfig) -> list[int]:
    """Elements of every parameter of the module, in its order."""
    return [prod(shape) for shape in weight_shapes(model).values()]


def items(setting: Setting) -> list[Item]:
    """Everything that a rank's GPU holds; nothing of no bytes."""
    sizes = parameter_sizes(setting.model)
    found = [
        *_states(sizes, setting),
        *_gradients(sizes, setting),
        *_buffers(sizes, setting),
        *_activations(setting),
    ]
    return [item for item in found if item.bytes and item.phases]


def by_phase(found: Sequence[Item]) -> dict[Phase, int]:
    """Bytes in each phase."""
    return {phase: sum(item.bytes for item in found if phase in item.phases) for phase in PHASES}


def peak(setting: Setting) -> int:
    """Bytes that a rank needs."""
    return max(by_phase(items(setting)).values())


def model_states(found: Sequence[Item]) -> int:
    """Bytes of weights, optimiser state and gradients when a step's last backward pass has ended."""
    return sum(item.bytes for item in found if item.is_state)


def optimizer_state(model: ModelConfig, optimizer: str) -> int:
    """Elements of fp32 that an optimiser keeps beside the weights (`lamda.engines.deepspeed.optimizer.fresh_state`)."""
    kept = 0
    for name, shape in weight_shapes(model).items():
        numel = prod(shape)
        if optimizer == "adafactor":
            kept += sum(shape)
        else:
            kept += numel if optimizer == "muon" and is_matrix(name) else 2 * numel
    return kept


def _states(sizes: Sequence[int], setting: Setting) -> Iterator[Item]:
    """Weights and the optimiser's state: there from the start to the end."""
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    kept = optimizer_state(setting.model, setting.optimizer)
    small = sum(size for size in sizes if size < sharding.persistent)
    own = sharding.share(total) if sharding.stage else total
    has_masters = sharding.stage or sharding.is_bf16
    yield Item("whole model in fp32", 4 * total, ("start",))
    yield _state("weights", (own if sharding.stage == 3 else total) * width, STEP)
    if sharding.stage == 3 and sharding.ranks > 1:
        yield _state("small weights, kept whole", small * width, STEP)
        yield Item("weights, gathered", min(total - small, sharding.live) * width, COMPUTING)
    yield _state("fp32 master weights", 4 * own if has_masters else 0, STEP)
    yield _state("optimiser's state", 4 * (sharding.share(kept) if sharding.stage else kept), STEP)


def _gradients(sizes: Sequence[int], setting: Setting) -> Iterator[Item]:
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    own = sharding.share(total)
    embedding = setting.model.vocab_size * setting.model.d_model
    # The tied embedding's first half waits for the second, from the first layer of the backward pass to the last.
    yield Item("gradients being computed", (embedding + max(sizes)) * width, ("backward",))
    # Those of a step's only micro-batch come as activations go.
    earlier: tuple[Phase, ...] = COMPUTING if setting.accumulation > 1 else ()
    if sharding.stage == 0:
        yield _state("gradients", total * width, (*earlier, "reduction", "update"))
    elif sharding.accumulates_whole:
        gradients = 0 if sharding.frees_gradients else total * width
        yield _state("gradients", gradients, (*earlier, "reduction", "update"))
        yield _state("fp32 accumulator", 4 * total, STEP)
    elif sharding.stage == 1:
        yield _state("gradients", total * width, (*earlier, "reduction"))
        yield Item("reduced gradients", own * width, ("reduction", "update"))
    elif sharding.stage == 2:
        is_apart = sharding.accumulated == width
        yield Item("gradients of this micro-batch", own * width if is_apart else 0, earlier)
        yield _state("accumulated gradients", own * sharding.accumulated, (*COMPUTING, "update"))
    else:
        yield _state("accumulated gradients", own * sharding.accumulated, STEP)


def _state(name: str, count: int, phases: Sequence[Phase]) -> Item:
    return Item(name, count, phases, is_state=True)


def _buffers(sizes: Sequence[int], setting: Setting) -> Iterator[Item]:
    """DeepSpeed's: buckets, and the copies that it makes to reduce and to step."""
    sharding, total, width = setting.sharding, sum(sizes), setting.sharding.weight
    own, sent = sharding.share(total), sharding.sent
    converted = sent if sent != width else 0
    reducing: tuple[Phase, ...] = ("backward",) if sharding.stage >= 2 else ("reduction",)
    in_flight = min(sharding.bucket, total)
    if sharding.stage == 0:
        flat = min(total, _REDUCED + max(sizes))
        yield Item("copies to reduce", flat * (width + converted), reducing)
        yield Item("gradients in fp32", 4 * total if sharding.is_bf16 else 0, ("update",))
    elif sharding.accumulates_whole:
        yield Item("copies to reduce", total * (4 + (sent if sent != 4 else 0)), reducing)
    else:
        element = sent if sharding.stage == 3 else width * sharding.buckets
        phases = STEP if sharding.stage == 3 else (*COMPUTING, "reduction")
        yield Item("reduction bucket", sharding.bucket * element, phases)
        copied = width + sent + converted if sharding.stage == 3 else width + sent if converted else 0
        yield Item("copies to reduce", in_flight * copied, reducing)
        is_copied = sharding.accumulated == width and (sharding.stage < 3 or sharding.is_bf16)
        yield Item("gradients in fp32", 4 * own if is_copied else 0, ("update",))
        yield Item("gradient norm in fp64", 8 * min(max(sizes), own), ("update",))


def _activations(setting: Setting) -> Iterator[Item]:
    found = setting.activations
    yield Item("activations", found.kept, COMPUTING)
    yield Item("logits and their gradient", found.logits, ("loss",))
    yield Item("a block's backward pass", found.block, ("backward",))
