"""`lamda checkpoint ls`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import show_table
from lamda.runs.checkpoints import CheckpointInfo, all_checkpoints, inspect_checkpoint, read_config
from lamda.storage.run_directory import RunDirectory


def parser() -> argparse.ArgumentParser:
    """The options of `lamda checkpoint ls`."""
    parser = argparse.ArgumentParser(prog="lamda checkpoint ls", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="a JSON array, one object per checkpoint")
    return parser


def main(argv: list[str]) -> int:
    """`RUN [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    if not options.run.is_dir():
        raise UserError(f"{options.run}: there is no such folder; `lamda list DIR` lists the runs below one")
    config = RunDirectory(options.run).config
    every = read_config(config).get("checkpoint.keep_every") if config.exists() else None
    infos = map(inspect_checkpoint, all_checkpoints(options.run))
    found = [(info, bool(every and info.step is not None and info.step % every == 0)) for info in infos]
    if options.json:
        print(json.dumps([asdict(info) | {"path": str(info.path), "kept": kept} for info, kept in found], indent=1))
    elif not found:
        print(f"{options.run}: no checkpoint here")
    else:
        header = ("checkpoint", "step", "size", "ranks", "ZeRO", "age", "state")
        show_table(header, [_cells(info, kept=kept) for info, kept in found], left=(0, 6))
    return 0


def _cells(info: CheckpointInfo, *, kept: bool) -> tuple[str, ...]:
    name, *cells, state = info.cells
    return name, str(info.step), *cells, state + ", kept for good" * (kept and info.problem is None)
