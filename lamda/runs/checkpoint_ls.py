"""`lamda checkpoint ls`: the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lamda.config.errors import UserError
from lamda.console import NONE, duration, show_table, size_of
from lamda.runs.checkpoints import Saved, all_checkpoints, glance, read_config
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
    every = _kept_every(RunDirectory(options.run))
    seen = map(glance, all_checkpoints(options.run))
    found = [(saved, every is not None and saved.step % every == 0) for saved in seen]
    if options.json:
        print(json.dumps([asdict(saved) | {"path": str(saved.path), "kept": kept} for saved, kept in found], indent=1))
    elif not found:
        print(f"{options.run}: no checkpoint is here")
    else:
        header = ("checkpoint", "step", "size", "ranks", "ZeRO", "age", "state")
        show_table(header, [_cells(saved, kept=kept) for saved, kept in found], left=(0, 6))
    return 0


def _kept_every(directory: RunDirectory) -> int | None:
    """`checkpoint.keep_every` of the run: checkpoints of steps that it divides stay for good."""
    return read_config(directory.config).get("checkpoint.keep_every") if directory.config.exists() else None


def _cells(saved: Saved, *, kept: bool) -> tuple[str, ...]:
    state = saved.state + ", kept for good" * (kept and saved.problem is None)
    age = NONE if saved.age_seconds is None else duration(saved.age_seconds)
    stage = saved.zero_stage if saved.framework == "deepspeed" else saved.framework
    ranks, stage = (NONE if value is None else str(value) for value in (saved.ranks, stage))
    return saved.path.name, str(saved.step), size_of(saved.bytes), ranks, stage, age, state
