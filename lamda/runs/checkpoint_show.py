"""`lamda checkpoint show`: the contents of a checkpoint."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lamda.config.errors import UserError
from lamda.config.loading import KEYS
from lamda.config.presets import PRESETS
from lamda.config.resources import templates
from lamda.console import NONE, duration, size_of
from lamda.durable import read_object
from lamda.runs.checkpoints import NAME, NAME_HELP, find_checkpoint, inspect_checkpoint, read_config, read_manifest
from lamda.storage.manifest import START

SHOWN = ("step", "updates", "samples", "tokens", "skipped")
"""What is shown of the state; "-" for what an older version did not record."""


def parser() -> argparse.ArgumentParser:
    """The options of `lamda checkpoint show`."""
    parser = argparse.ArgumentParser(prog="lamda checkpoint show", allow_abbrev=False)
    parser.add_argument("name", metavar=NAME, help=NAME_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`CHECKPOINT_OR_RUN [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    content = describe(find_checkpoint(options.name))
    print(json.dumps(content, indent=1) + "\n" if options.json else _text(content), end="")
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Manifest, state, record of the start, non-default configuration, and tensors. Raises UserError."""
    config = read_config(path / "config.yaml")
    return {
        "checkpoint": str(path),
        "manifest": read_manifest(path),
        "state": read_state(path),
        "start": read_start(path),
        "configuration": {key: value for key, value in config.items() if value != default_of(key, config)},
        "tensors": read_tensors(path / "model.safetensors"),
    }


def read_state(path: Path) -> dict[str, Any]:
    """run_state.json of a checkpoint of any version. Raises UserError."""
    try:
        return read_object(path / "run_state.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'run_state.json'}: cannot be read ({error})") from error


def read_start(path: Path) -> dict[str, Any] | None:
    """start.json of a checkpoint, None in those of earlier versions. Raises UserError."""
    try:
        return read_object(path / START)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / START}: cannot be read ({error})") from error


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


def _text(content: dict[str, Any]) -> str:
    """The content for people; equal tensors of all layers share a line."""
    tensors = content["tensors"]
    groups = Counter(
        (re.sub(r"^layers\.\d+\.", "layers.*.", name), " x ".join(map(str, tensor["shape"])), tensor["dtype"])
        for name, tensor in tensors.items()
    )
    text = templates("runs/static")
    text.filters |= {
        "count": lambda number: NONE if number is None else f"{number:,}",
        "duration": duration,
        "json": json.dumps,
        "size": size_of,
    }
    return text.get_template("checkpoint.txt.jinja").render(
        content | {"state": dict.fromkeys(SHOWN) | content["state"]},
        info=inspect_checkpoint(Path(content["checkpoint"])),
        parameters=sum(prod(tensor["shape"]) for tensor in tensors.values()),
        groups=groups,
        widths=[max((len(group[column]) for group in groups), default=0) for column in (0, 1)],
    )
