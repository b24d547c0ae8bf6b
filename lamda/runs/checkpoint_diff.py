"""`lamda checkpoint diff`: the differences between two checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sized
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lamda.config.errors import UserError
from lamda.config.loading import KEYS
from lamda.console import show_table
from lamda.runs.checkpoint_show import default_of, read_state, read_tensors
from lamda.runs.checkpoints import NAME_HELP, find_checkpoint, read_config, read_manifest

if TYPE_CHECKING:
    import torch

NOT_COMPARED = ("run.dir", "wandb.name", "wandb_id")
"""Keys that name a run, which are not compared."""
CHUNK_ELEMENTS = 1 << 22
"""So many at a time, so that a large tensor is never copied whole to fp64."""
MAX_LINES = 30
"""Lines per section; --json has all."""


class TensorDifference(NamedTuple):
    """How a tensor differs between two checkpoints. what: the kind of difference, for people."""

    tensor: str
    what: str
    largest: float | None = None
    share: float | None = None


def parser() -> argparse.ArgumentParser:
    """The options of `lamda checkpoint diff`."""
    parser = argparse.ArgumentParser(
        prog="lamda checkpoint diff", allow_abbrev=False, epilog="exit code: 0 if they are the same, 1 if they differ"
    )
    for name in "AB":
        parser.add_argument(name, help=NAME_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`A B [--json]`; returns 0 where they are the same, 1 where they differ. Raises UserError."""
    options = parser().parse_args(argv)
    first, second = find_checkpoint(options.A), find_checkpoint(options.B)
    found = compare(first, second)
    print(json.dumps(found, indent=1)) if options.json else _show(found)
    return int(not found["same"])


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Compare weights, optimizer state, run state and configuration. Raises UserError.

    The optimizer files are compared by their hashes in the manifests, for DeepSpeed checkpoints of equal
    numbers of ranks only; otherwise the result is `unknown`, which counts as no difference.
    """
    weights = [each._asdict() for each in compare_weights(first, second)]
    optimizer = _compare_optimizers(read_manifest(first), read_manifest(second))
    state = _compare_values(*(_flattened(read_state(path)) for path in (first, second)))
    configuration = _compare_values(_configuration(first), _configuration(second))
    return {
        "same": not (weights or state or configuration or optimizer == "different"),
        "a": str(first),
        "b": str(second),
        "weights": weights,
        "optimizer": optimizer,
        "state": state,
        "configuration": configuration,
    }


def compare_weights(first: Path, second: Path) -> list[TensorDifference]:
    """The tensors of model.safetensors that differ, by name; NaN equals NaN."""
    files = [path / "model.safetensors" for path in (first, second)]
    a, b = map(read_tensors, files)
    different: list[TensorDifference] = []
    try:
        with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
            for name in dict.fromkeys((*a, *b)):
                if name not in a or name not in b:
                    different.append(TensorDifference(name, "only in B" if name not in a else "only in A"))
                elif a[name]["shape"] != b[name]["shape"]:
                    different.append(TensorDifference(name, f"shape {a[name]['shape']} and {b[name]['shape']}"))
                else:
                    largest, share = compare_tensors(one.get_tensor(name), other.get_tensor(name))
                    is_cast = a[name]["dtype"] != b[name]["dtype"]
                    if share or is_cast:
                        what = f"type {a[name]['dtype']} and {b[name]['dtype']}" if is_cast else "values"
                        different.append(TensorDifference(name, what, largest, share))
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights of {first} and {second}: cannot be read ({error})") from error
    return different


def compare_tensors(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, float]:
    """The largest absolute difference (None if not finite) and the fraction of differing elements; NaN equals NaN.

    The tensors have the same shape. The differences are taken in fp64.
    """
    largest, count = 0.0, 0
    for x, y in zip(a.flatten().split(CHUNK_ELEMENTS), b.flatten().split(CHUNK_ELEMENTS), strict=True):
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        count += int(unequal.sum())
        gaps = (x - y).abs()[unequal]
        if gaps.numel():
            largest = max(largest, float(gaps.nan_to_num(nan=inf, posinf=inf).max()))
    return (largest if largest < inf else None), count / max(1, a.numel())


def _compare_optimizers(a: dict[str, Any], b: dict[str, Any]) -> str:
    hashes = [
        {name: entry.get("sha256") for name, entry in each["files"].items() if name.startswith("optimizer-")}
        for each in (a, b)
    ]
    if (
        not hashes[0]
        or None in hashes[0].values()
        or hashes[0].keys() != hashes[1].keys()
        or a.get("zero_stage") != b.get("zero_stage")
    ):
        return "unknown"
    return "same" if hashes[0] == hashes[1] else "different"


def _configuration(path: Path) -> dict[str, Any]:
    """The configuration, with defaults for keys that an older version lacks."""
    config = read_config(path / "config.yaml")
    return {key: default_of(key, config) for key in KEYS} | config


def _compare_values(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Both values of every key that differs, None for a missing key."""
    names = (name for name in dict.fromkeys((*a, *b)) if name not in NOT_COMPARED)
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _flattened(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted key."""
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flattened(part, f"{prefix}{name}.") if isinstance(part, dict) else {f"{prefix}{name}": part}
    return flat


def _show(found: dict[str, Any]) -> None:
    print(f"A: {found['a']}\nB: {found['b']}\n")
    weights = found["weights"]
    print(f"weights: {len(weights)} tensors differ" if weights else "weights: the same")
    if weights:
        rows = [(each["tensor"], each["what"], _number(each["largest"]), _number(each["share"])) for each in weights]
        show_table(("tensor", "by", "largest difference", "share of elements"), rows[:MAX_LINES], left=(0, 1))
        _show_rest(rows)
    reason = " (not compared: another number of ranks or ZeRO stage, or not DeepSpeed)"
    print(f"optimizer state: {found['optimizer']}{reason if found['optimizer'] == 'unknown' else ''}")
    for part in ("state", "configuration"):
        different = found[part]
        print(f"{part}: " + (f"{len(different)} keys differ" if different else "the same"))
        for name, (a, b) in list(different.items())[:MAX_LINES]:
            print(f"  {name}: {_short(a)} and {_short(b)}")
        _show_rest(different)


def _show_rest(lines: Sized) -> None:
    if len(lines) > MAX_LINES:
        print(f"  and {len(lines) - MAX_LINES} more (--json has all)")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
