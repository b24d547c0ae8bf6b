"""ZeRO: how DeepSpeed 0.19.8 shards model state over ranks, and what the ranks send each other in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lamda.config.ds_config import is_bf16, offload_device, zero_stage
from lamda.config.errors import UserError

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
_TRIPS: dict[Kind, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
_WIDTHS = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sharding:
    """ZeRO stage, ranks, and bytes per element of weights, accumulated gradients and communicated gradients.

    bucket: gradients reduced together. buckets: number of buffers of that size. live: the most weights that stage 3
    keeps gathered. persistent: smaller parameters stay gathered. All but `buckets` are in elements. secondary: ranks
    that share a second copy of the weights between forward and backward pass; 1 if there is none (stage 3).
    frees_gradients: each gradient is added to the accumulator and freed as soon as it is computed. offloads_optimizer:
    masters, optimizer state and accumulated gradients are in host memory; offloads_weights: the weights too.
    """

    stage: int
    ranks: int
    weight: int
    accumulated: int
    sent: int
    bucket: int = 500_000_000
    buckets: int = 1
    live: int = 1_000_000_000
    persistent: int = 100_000
    secondary: int = 1
    frees_gradients: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @classmethod
    def of(cls, ds_config: dict[str, Any], *, ranks: int) -> Sharding:
        """The sharding of a DeepSpeed configuration; missing keys have DeepSpeed's defaults.

        Raises UserError for a value of the wrong kind.
        """
        zero, weight = ds_config.get("zero_optimization", {}), 2 if is_bf16(ds_config) else 4
        return cls(
            stage=zero_stage(ds_config),
            ranks=ranks,
            weight=weight,
            accumulated=_width("data_types.grad_accum_dtype", ds_config.get("data_types", {}), default=weight),
            sent=_width("communication_data_type", ds_config, default=weight),
            bucket=_elements("reduce_bucket_size", zero, default=cls.bucket),
            buckets=2 if zero.get("overlap_comm") else 1,
            live=_elements("stage3_max_live_parameters", zero, default=cls.live),
            persistent=_elements("stage3_param_persistence_threshold", zero, default=cls.persistent),
            secondary=min(ranks, _elements("zero_hpz_partition_size", zero, default=cls.secondary)),
            frees_gradients=bool(ds_config.get("bf16", {}).get("immediate_grad_update")),
            offloads_optimizer=offload_device(ds_config, "offload_optimizer") != "none",
            offloads_weights=offload_device(ds_config, "offload_param") != "none",
        )

    @property
    def is_bf16(self) -> bool:
        """Whether the weights are bf16 (else fp32)."""
        return self.weight == 2

    @property
    def accumulates_whole(self) -> bool:
        """Whether every rank accumulates all gradients in fp32 and reduces them once per step (BF16_Optimizer)."""
        return self.stage == 1 and self.accumulated > self.weight

    @property
    def width_on_host(self) -> int:
        """Bytes per element of a rank's weights in host memory."""
        return self.weight if self.offloads_weights or (self.stage == 2 and self.offloads_optimizer) else 0

    def at_stage(self, stage: int) -> Sharding:
        """The same at another ZeRO stage; stage 0 has no accumulator of another precision, and 2 and 3 can offload."""
        return replace(
            self,
            stage=stage,
            accumulated=self.accumulated if stage else self.weight,
            offloads_optimizer=self.offloads_optimizer and stage >= 2,
            offloads_weights=self.offloads_weights and stage == 3,
        )

    def share(self, elements: int) -> int:
        """Elements per rank of a sharded tensor."""
        return -(-elements // self.ranks)


def _width(key: str, values: dict[str, Any], *, default: int) -> int:
    name = values.get(key.rpartition(".")[2])
    if name is None:
        return default
    if not isinstance(name, str) or name not in _WIDTHS:
        raise UserError(f"the DeepSpeed file: {key}: {name!r} is none of {', '.join(_WIDTHS)}")
    return _WIDTHS[name]


def _elements(key: str, zero: dict[str, Any], *, default: int) -> int:
    count = zero.get(key, default)
    if not isinstance(count, int | float) or not 0 <= count < math.inf:
        raise UserError(f"the DeepSpeed file: zero_optimization.{key}: {count!r} is not a number of elements")
    return int(count)


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors of a collective in a step, and bytes that a rank sends for them in a ring.

    at_most: whether the real numbers may be lower.
    """

    kind: Kind
    tensors: int
    sent: int
    at_most: bool = False


def traffic(sizes: Sequence[int], sharding: Sharding, *, accumulation: int) -> list[Traffic]:
    """The collectives of a step; `sizes` are elements per parameter.

    Stage 2 reduces with all-reduce, whatever DeepSpeed calls it. Stage 3 gathers the weights for the forward
    pass of each micro-batch and, if they exceed `live`, at most all of them again for the backward pass. Reductions
    of a few numbers are not counted; one rank sends nothing.
    """
    if sharding.ranks == 1:
        return []
    total, weight = sum(sizes), sharding.weight
    gradients = total * sharding.sent
    twice = False
    if sharding.stage == 3:
        small = sum(size for size in sizes if size < sharding.persistent)
        twice = total - small > sharding.live
        found: dict[Kind, int] = {
            "all-gather": (small + accumulation * (1 + twice) * (total - small)) * weight,
            "reduce-scatter": accumulation * gradients,
        }
    else:
        found = {"all-reduce": gradients * (accumulation if sharding.stage == 2 else 1)}
        if sharding.stage:
            found["all-gather"] = total * weight
    return [
        Traffic(
            kind, count, _TRIPS[kind] * count * (sharding.ranks - 1) // sharding.ranks, twice and kind == "all-gather"
        )
        for kind, count in found.items()
    ]
