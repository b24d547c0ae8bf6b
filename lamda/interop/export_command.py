"""`lamda export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The options of `lamda export`."""
    parser = argparse.ArgumentParser(prog="lamda export", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or this one")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"],
        help="default: as the checkpoint computes; float32 takes the optimizer's fp32 weights",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file, such as 500MB; default %(default)s"
    )
    return parser


def main(argv: list[str]) -> int:
    """As `lamda export --help` says; raises UserError."""
    options = parser().parse_args(argv)
    from lamda.distributed import choose_accelerator
    from lamda.interop.huggingface.export import export

    choose_accelerator()
    dtype = export(options.path, options.to, dtype=options.dtype, max_shard_size=options.max_shard_size)
    weights = sorted(options.to.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    parts = f"{len(weights)} files" if len(weights) > 1 else "one file"
    print(f"{options.to}: weights in {dtype}, {size / 1e6:,.1f} MB in {parts}")
    return 0
