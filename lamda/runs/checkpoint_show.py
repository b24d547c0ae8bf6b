"""`lamda checkpoint show`: the contents of a checkpoint."""

from __future__ import annotations

import argparse
import json
import re
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lamda.config.errors import UserError
from lamda.config.loading import KEYS
from lamda.config.presets import PRESETS
from lamda.console import duration, size_of
from lamda.durable import read_object
from lamda.runs.checkpoints import NAME, NAME_HELP, find_checkpoint, inspect_checkpoint, read_config, read_manifest


def parser() -> argparse.ArgumentParser:
    """The options of `lamda checkpoint show`."""
    parser = argparse.ArgumentParser(prog="lamda checkpoint show", allow_abbrev=False)
    parser.add_argument("name", metavar=NAME, help=NAME_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`CHECKPOINT_OR_RUN [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    path = find_checkpoint(options.name)
    content = describe(path)
    print(json.dumps(content, indent=1) if options.json else "\n".join(_lines(path, content)))
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Manifest, state, non-default configuration, and tensors. Raises UserError."""
    config = read_config(path / "config.yaml")
    return {
        "checkpoint": str(path),
        "manifest": read_manifest(path),
        "state": read_state(path),
        "configuration": {key: value for key, value in config.items() if value != default_of(key, config)},
        "tensors": read_tensors(path / "model.safetensors"),
    }


def read_state(path: Path) -> dict[str, Any]:
    """run_state.json of a checkpoint of any version. Raises UserError."""
    try:
        return read_object(path / "run_state.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'run_state.json'}: cannot be read ({error})") from error


def read_tensors(file: Path) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every tensor by name, layer 2 before layer 10. Raises UserError."""
    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in sorted(opened.keys(), key=_natural_order)}
            return {name: {"shape": part.get_shape(), "dtype": part.get_dtype()} for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part or -1), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def default_of(key: str, config: dict[str, Any]) -> Any:
    """The default of a key, which for `model.` keys depends on the preset."""
    section, _, name = key.partition(".")
    preset = PRESETS.get(config.get("model.preset") or "", {}) if section == "model" else {}
    return preset[name] if name in preset else KEYS[key].default if key in KEYS else None


def _lines(path: Path, content: dict[str, Any]) -> list[str]:
    info, manifest, state = inspect_checkpoint(path), content["manifest"], content["state"]
    problem = f"; {info.problem}" if info.problem else ""
    ranks = f"{manifest['ranks']} rank" + "s" * (manifest["ranks"] != 1)
    framework = info.framework if manifest.get("zero_stage") is None else f"ZeRO stage {manifest['zero_stage']}"
    skipped = ", ".join(f"{first} to {last - 1}" for first, last in state["skipped"]) or "none"
    count = sum(prod(tensor["shape"]) for tensor in content["tensors"].values())
    figures = {
        "checkpoint": str(path),
        "saved": f"{duration(info.age_seconds)} ago by {ranks}, {framework}",
        "size": f"{size_of(info.bytes)} in {len(manifest['files'])} files{problem}",
        "step": f"{state['step']:,}",
        "updates": f"{state['updates']:,} ({state['step'] - state['updates']:,} steps skipped)",
        "samples": f"{state['samples']:,}",
        "tokens": f"{state['tokens']:,}",
        "skipped samples": skipped,
        "parameters": f"{count:,} in {len(content['tensors'])} tensors",
    }
    return [
        *(f"{name:<17}{value}" for name, value in figures.items()),
        "",
        *_tensor_lines(content["tensors"]),
        "",
        "non-default configuration:",
        *(f"  {key}: {json.dumps(value)}" for key, value in content["configuration"].items()),
    ]


def _tensor_lines(tensors: dict[str, dict[str, Any]]) -> list[str]:
    """One line per tensor name, with equal tensors of all layers in one."""
    groups: dict[tuple[str, str, str], int] = {}
    for name, tensor in tensors.items():
        shape = " x ".join(map(str, tensor["shape"]))
        group = (re.sub(r"^layers\.\d+\.", "layers.*.", name), shape, tensor["dtype"])
        groups[group] = groups.get(group, 0) + 1
    widths = [max((len(group[column]) for group in groups), default=0) for column in (0, 1)]
    return [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype}" + (f", {count} times" if count > 1 else "")
        for (name, shape, dtype), count in groups.items()
    ]
