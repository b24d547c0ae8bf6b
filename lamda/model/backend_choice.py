"""What each attention backend needs, and which one `model.attention: auto` means; without torch, for `lamda plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from lamda.config.errors import UserError
from lamda.config.schema import Attention, Backend

OLDEST = (8, 0)
"""The lowest compute capability that the kernels were compiled for; older GPUs have no bf16."""
MAX_WIDTH = 128
"""The largest K that the kernels were compiled for; 256 exceeds the shared memory of many GPUs."""
MIN_FLEX_WIDTH = 16
"""The smallest K that the FlexAttention kernels for GPUs accept."""


@dataclass(frozen=True)
class Target:
    """Where attention is computed, and on what.

    capability: compute capability of a CUDA GPU; None on any other device. element_size: bytes of an element of q, k
    and v. width: K. missing: what Triton needs and this machine lacks, in words. interpreted: whether Triton's
    interpreter runs the kernels, which then work on any device and in any precision.
    """

    capability: tuple[int, int] | None
    element_size: int
    width: int
    missing: str | None = None
    interpreted: bool = False


def resolve(attention: Attention, target: Target, *, training: bool) -> Backend:
    """The backend that `model.attention` means. Raises UserError if it was named and has an obstacle."""
    if attention == "auto":
        return choose(target)
    if problem := obstacle(attention, target, training=training):
        raise UserError(f"model.attention is {attention}: {problem}; `auto` is `{choose(target)}` here")
    return attention


def choose(target: Target) -> Backend:
    """The backend that `auto` means: `fused` or `flex` on a CUDA GPU where it can train, else `sdpa`.

    In 32 bits the tiles of `fused` do not fit into registers, so `flex` is chosen.
    """
    preferred: Backend = "fused" if target.element_size == 2 else "flex"
    if target.capability is None or obstacle(preferred, target, training=True):
        return "sdpa"
    return preferred


def obstacle(name: Backend, target: Target, *, training: bool) -> str | None:
    """Why a backend cannot compute (or, with `training`, train) there; None if it can."""
    match name:
        case "math" | "sdpa":
            return None
        case "flex":
            return _obstacle_to_flex(target, training=training)
        case "fused" | "split":
            return _obstacle_to_kernels(target) or (_obstacle_to_plain_kernels(target) if name == "split" else None)
        case _:
            assert_never(name)


def _obstacle_to_flex(target: Target, *, training: bool) -> str | None:
    if target.capability is None:
        return "FlexAttention has no backward pass on the CPU" if training else None
    if target.width < MIN_FLEX_WIDTH:
        return f"on a GPU it takes a model.d_head of {MIN_FLEX_WIDTH} and more, not {target.width}"
    return _obstacle_to_kernels(target) if training else target.missing and f"its kernels need {target.missing}"


def _obstacle_to_kernels(target: Target) -> str | None:
    if target.interpreted:
        return None
    if target.missing:
        return f"its kernels need {target.missing}"
    if target.capability is None:
        return "its kernels need a GPU"
    if target.capability < OLDEST:
        oldest, this = (".".join(map(str, each)) for each in (OLDEST, target.capability))
        return f"its kernels need a GPU of compute capability {oldest} or newer, and this one's is {this}"
    if target.width > MAX_WIDTH or target.element_size > 4:
        return f"its kernels take a model.d_head of up to {MAX_WIDTH} in 16 or 32 bits, not {_shape(target)}"
    return None


def _obstacle_to_plain_kernels(target: Target) -> str | None:
    """Those that `split` takes for far keys; the ones for a CPU take all."""
    if target.capability is None or (target.element_size == 2 and target.width % 8 == 0):
        return None
    return f"its plain kernels take 16 bits and a model.d_head of 8, 16, ... {MAX_WIDTH}, not {_shape(target)}"


def _shape(target: Target) -> str:
    return f"{target.width} in {8 * target.element_size}"
