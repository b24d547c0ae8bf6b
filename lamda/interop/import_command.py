"""`lamda import`: a Hugging Face folder as one that `model.weights` and `lamda generate` take."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The options of `lamda import`."""
    parser = argparse.ArgumentParser(prog="lamda import", allow_abbrev=False)
    parser.add_argument("path", metavar="DIR", type=Path, help="a folder that `lamda export` wrote")
    parser.add_argument("--to", metavar="RUNLIKE_DIR", type=Path, required=True, help="a new folder")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda import --help` says; raises UserError."""
    options = parser().parse_args(argv)
    from lamda.interop.huggingface.importing import import_folder

    import_folder(options.path, options.to)
    weights = options.to / "model.safetensors"
    print(f"{options.to}: set model.weights to {weights}, or try `lamda generate {options.to}`")
    return 0
