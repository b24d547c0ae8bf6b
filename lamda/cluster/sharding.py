"""How DeepSpeed divides a model's state over ranks: the part of its configuration that memory and traffic depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lamda.config.ds_config import is_bf16, zero_stage
from lamda.config.errors import UserError

_WIDTHS = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sharding:
    """ZeRO stage, ranks, and bytes an element: of weights and their gradients, accumulated gradients, gradients sent.

    bucket: gradients that are reduced together. buckets: buffers of that many. live: weights that stage 3
    keeps gathered, at most. persistent: parameters smaller than this stay gathered. All but `buckets` in elements.
    frees_gradients: each gradient is added to the accumulator, and gone, as soon as it is there.
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
    frees_gradients: bool = False

    @classmethod
    def of(cls, own: dict[str, Any], *, ranks: int) -> Sharding:
        """The sharding that a DeepSpeed dict asks for; what it leaves out is DeepSpeed 0.19.8's default.

        Raises UserError for a value of the wrong kind.
        """
        zero, weight = own.get("zero_optimization", {}), 2 if is_bf16(own) else 4
        return cls(
            stage=zero_stage(own),
            ranks=ranks,
            weight=weight,
            accumulated=_width("data_types.grad_accum_dtype", own.get("data_types", {}), default=weight),
            sent=_width("communication_data_type", own, default=weight),
            bucket=_elements("reduce_bucket_size", zero, default=cls.bucket),
            buckets=2 if zero.get("overlap_comm") else 1,
            live=_elements("stage3_max_live_parameters", zero, default=cls.live),
            persistent=_elements("stage3_param_persistence_threshold", zero, default=cls.persistent),
            frees_gradients=bool(own.get("bf16", {}).get("immediate_grad_update")),
        )

    @property
    def is_bf16(self) -> bool:
        """Whether the weights are bf16 (else fp32)."""
        return self.weight == 2

    @property
    def accumulates_whole(self) -> bool:
        """Whether every rank adds up gradients of the whole model in fp32, reduced once a step (BF16_Optimizer)."""
        return self.stage == 1 and self.accumulated > self.weight

    def at_stage(self, stage: int) -> Sharding:
        """The same at another ZeRO stage; without ZeRO there is no accumulator of another precision."""
        return replace(self, stage=stage, accumulated=self.accumulated if stage else self.weight)

    def share(self, elements: int) -> int:
        """Elements a rank of what is divided over the ranks."""
        return -(-elements // self.ranks)


def _width(key: str, values: dict[str, Any], *, default: int) -> int:
    name = values.get(key.rpartition(".")[2])
    if name is None:
        return default
    if name not in _WIDTHS:
        raise UserError(f"the DeepSpeed file: {key}: {name!r} is none of {', '.join(_WIDTHS)}")
    return _WIDTHS[name]


def _elements(key: str, zero: dict[str, Any], *, default: int) -> int:
    count = zero.get(key, default)
    if not isinstance(count, int | float) or count < 0:
        raise UserError(f"the DeepSpeed file: zero_optimization.{key}: {count!r} is no number of elements")
    return int(count)
