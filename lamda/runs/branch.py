"""`lamda branch`: a new run that continues from a checkpoint of another one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lamda.config.errors import UserError
from lamda.config.help import ConfigParser, to_yaml
from lamda.config.loading import load_config
from lamda.config.stages import plan_stages, stage_at
from lamda.durable import replace_file
from lamda.runs.checkpoints import NAME, find_checkpoint
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.resume import require_resumable


def parser() -> ConfigParser:
    """The options of `lamda branch`; without --config, keys are those of the checkpoint."""
    parser = ConfigParser("lamda branch")
    parser.add_argument("checkpoint", metavar=NAME, help="RUN@STEP, a run (its newest checkpoint), or a checkpoint")
    parser.add_argument("--to", type=Path, required=True, metavar="NEW", help="folder of the new run")
    parser.add_argument(
        "--fresh-data", action="store_true", help="begin the text of the configuration at its beginning; it may differ"
    )
    return parser


def main(argv: list[str]) -> int:
    """`RUN@STEP --to NEW [--fresh-data] [--section.key VALUE ...]`; raises UserError."""
    options, flags = parser().parse_known_args(argv)
    directory = branch(options.checkpoint, flags, to=options.to, fresh_data=options.fresh_data)
    print(
        f"{directory.path} begins from {options.checkpoint}; to train it: --config {shlex.quote(str(directory.config))}"
    )
    return 0


def branch(checkpoint: str, flags: Sequence[str], *, to: Path, fresh_data: bool) -> RunDirectory:
    """Make the run directory `to`. Raises UserError, and then leaves nothing behind."""
    path, directory = find_checkpoint(checkpoint), RunDirectory(to)
    if (problem := manifest.problem_of(path)) is not None:
        raise UserError(f"{path}: {problem}; `lamda checkpoint verify` checks the others")
    if taken := [flag for flag in flags if flag.partition("=")[0] in ("--run.dir", "--checkpoint.resume")]:
        raise UserError(f"{taken[0]}: a branch begins in the folder --to, from its checkpoint there; remove it")
    names_a_file = any(flag.partition("=")[0] == "--config" for flag in flags)
    base = [] if names_a_file else ["--config", str(path / "config.yaml")]
    config = load_config([*base, *flags, "--run.dir", str(to), "--checkpoint.resume", "auto"])
    state = replace(manifest.read_state(path), wandb_id=None)
    begin = state
    if fresh_data:
        begin = state.with_fresh_data(stage=stage_at(plan_stages(config), state.step).number)
    require_resumable(config, path, begin, framework=manifest.framework_of(manifest.read(path)))
    if not directory.create():
        raise UserError(f"--to {to}: exists already; choose another folder")
    try:
        directory.note_checkpoint(state.step)  # first: what a kill leaves is no run that starts over
        _fill(directory, path, state, fresh_data=fresh_data)
        replace_file(directory.config, to_yaml(config))
        final = directory.checkpoints / manifest.name_of(state.step)
        _copy_checkpoint(path, final, begin)
    except BaseException as error:
        shutil.rmtree(directory.path, ignore_errors=True)
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise UserError(f"{path}: its run has deleted it meanwhile (checkpoint.keep); name a newer one") from error
        raise
    return directory


def _fill(directory: RunDirectory, path: Path, state: RunState, *, fresh_data: bool) -> None:
    """Tokenizer, parent, metrics up to the checkpoint, and where its data order stands."""
    parent = RunDirectory(path.resolve().parent.parent)
    shutil.copyfile(manifest.named(path, "tokenizer.model"), directory.tokenizer)
    origin = {"run": str(parent.path), "step": state.step, "fresh_data": fresh_data, "time": time.time()}
    replace_file(directory.branch, json.dumps(origin) + "\n")
    rows = [row for row in read_metrics(parent.metrics) if row["step"] <= state.step]
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    if not fresh_data:
        directory.inherit_skipped(parent)
        for source, target in ((parent.order, directory.order), (parent.stages, directory.stages)):
            if source.exists():
                shutil.copyfile(source, target)


def _copy_checkpoint(path: Path, final: Path, state: RunState) -> None:
    """The checkpoint with another state. Its large files never change, so they are linked where that is possible."""
    from lamda.storage import commit  # imports torch

    content = manifest.read(path)
    temporary = final.with_name(f".{final.name}.tmp")
    commit.make_fresh(temporary)
    for name in content["files"]:
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name != manifest.STATE:
            with suppress(OSError):
                os.link(path / name, target)
                continue
            shutil.copyfile(path / name, target)
    state.write(temporary / manifest.STATE)
    content["files"][manifest.STATE] = commit.sync_and_describe(temporary / manifest.STATE)
    del content["sha256"]
    commit.commit(temporary, final, content, keep=1)
