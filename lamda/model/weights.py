"""The weights by plain name, and how the module packs them.

Query, key and value are one matrix in the module, and so are gate and up. Files and people see the
plain ones; matrices are [out, in], rows of query, key and value head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, cast

from lamda.config import ModelConfig
from lamda.config.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

BUCKETS = 32
Part = Literal["embedding", "matrices", "final_norm", "others"]
_NAMED = 8


@dataclass(frozen=True)
class PlainSlice:
    """A plain weight and its place: elements `start` to `start + numel` of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)


def plain_slices(config: ModelConfig) -> dict[str, list[PlainSlice]]:
    """The plain weights of every parameter of the module, by the parameter's name, in the module's order."""
    D, F, HK = config.d_model, config.d_ff, config.n_heads * config.d_head
    table = (BUCKETS, config.n_heads)
    slices = {} if config.bias_per_layer else _unpacked("relative_bias", table)
    slices |= _unpacked("embedding.weight", (config.vocab_size, D))
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        slices |= _unpacked(f"{layer}.attention_norm.scale", (D,))
        if config.bias_per_layer:
            slices |= _unpacked(f"{layer}.attention.relative_bias", table)
        slices |= _packed(f"{layer}.attention", ("query", "key", "value"), (HK, D))
        slices |= _unpacked(f"{layer}.attention.output.weight", (D, HK))
        slices |= _unpacked(f"{layer}.feed_forward_norm.scale", (D,))
        slices |= _packed(f"{layer}.feed_forward", ("gate", "up"), (F, D))
        slices |= _unpacked(f"{layer}.feed_forward.down.weight", (D, F))
    return slices | _unpacked("final_norm.scale", (D,))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """See `LaMDA.load_weights`."""
    own = export_weights(model)
    wanted, found = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, weights))
    check_shapes(wanted, found)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """See `LaMDA.export_weights`."""
    slices = plain_slices(cast("ModelConfig", model.config))
    return {
        plain.name: parameter.detach().view(-1)[plain.start : plain.start + plain.numel].view(plain.shape)
        for packed, parameter in model.named_parameters()
        for plain in slices[packed]
    }


def _unpacked(name: str, shape: tuple[int, ...]) -> dict[str, list[PlainSlice]]:
    return {name: [PlainSlice(name, shape, 0)]}


def _packed(layer: str, parts: Sequence[str], shape: tuple[int, ...]) -> dict[str, list[PlainSlice]]:
    places = enumerate(parts)
    return {
        f"{layer}.{'_'.join(parts)}.weight": [
            PlainSlice(f"{layer}.{part}.weight", shape, place * prod(shape)) for place, part in places
        ]
    }


def check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError that names every weight that is missing, unexpected or of another shape."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        told = "\n".join(f"  {len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(
            f"the weights are not of this model:\n{told}\nset the `model` keys that the weights were made with"
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to."""
    if name == "embedding.weight":
        return "embedding"
    if name == "final_norm.scale":
        return "final_norm"
    return "matrices" if name.endswith(".weight") else "others"
