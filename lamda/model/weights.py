"""Names and shapes of the weights, the same in the module and in files. Matrices are [outputs, inputs]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

from lamda.config import ModelConfig
from lamda.config.errors import UserError

BUCKETS = 32

ParamGroup = Literal["embedding", "query", "matrices", "norms", "final_norm", "bias"]
"""Weights that share a learning rate and a weight decay. matrices: those of the blocks, except the query."""
PARAM_GROUPS: tuple[ParamGroup, ...] = get_args(ParamGroup)
MATRIX_GROUPS: tuple[ParamGroup, ...] = ("query", "matrices")

_MAX_NAMED = 8  # weights that an error names, per problem


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name, in module order. Rows of query, key and value are grouped by head."""
    D, F, HK = config.d_model, config.d_ff, config.n_heads * config.d_head
    table = (BUCKETS, config.n_heads)
    shapes: dict[str, tuple[int, ...]] = {} if config.bias_per_layer else {"relative_bias": table}
    shapes["embedding.weight"] = (config.vocab_size, D)
    for layer in (f"layers.{i}" for i in range(config.n_layers)):
        shapes[f"{layer}.attention_norm.scale"] = (D,)
        if config.bias_per_layer:
            shapes[f"{layer}.attention.relative_bias"] = table
        shapes |= {f"{layer}.attention.{name}.weight": (HK, D) for name in ("query", "key", "value")}
        shapes[f"{layer}.attention.output.weight"] = (D, HK)
        shapes[f"{layer}.feed_forward_norm.scale"] = (D,)
        shapes |= {f"{layer}.feed_forward.{name}.weight": (F, D) for name in ("gate", "up")}
        shapes[f"{layer}.feed_forward.down.weight"] = (D, F)
    return shapes | {"final_norm.scale": (D,)}


def check_shapes(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError naming every weight that is missing, unexpected or has another shape."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [
        f"{name} is {list(given[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        details = "\n".join(f"  {len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(
            f"the weights do not fit this model:\n{details}\nset the `model` keys that the weights were made with"
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def param_group_of(name: str) -> ParamGroup:
    """The parameter group of a weight; adapters are matrices."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    if last == "scale":
        return "final_norm" if name == "final_norm.scale" else "norms"
    if last == "relative_bias":
        return "bias"
    return cast("ParamGroup", last) if last in ("embedding", "query") else "matrices"


def is_matrix(name: str) -> bool:
    """Whether a weight is a matrix of a block (or an adapter's)."""
    return param_group_of(name) in MATRIX_GROUPS
