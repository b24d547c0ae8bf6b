"""Real runs, as a user starts them: one that is stopped and resumed, and one that learns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lamda import distributed
from lamda.cluster.compare import compare_runs
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.data.standard_library import write_corpus
from lamda.dialog.examples import form_of
from lamda.model.counts import parameters
from lamda.proof.devices import deepspeed_obstacle, device, loop_name, require_deepspeed
from lamda.proof.findings import Findings
from lamda.proof.parts import TEXT
from lamda.proof.plain_loop import PlainLoop
from lamda.proof.sizes import Flags, Sizes
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.inputs import Inputs
from lamda.training.lr_schedule import next_learning_rate
from lamda.training.stop_requests import STOP_EXIT

LOG_LINES = 15


def _text_flags(sizes: Sizes, folder: Path) -> Flags:
    """The text of the runs: `FOLDER/text`, which is the standard library of this Python if nothing was carried."""
    text = folder / TEXT
    write_corpus(text)
    flags = (f"--data.files={text}/train/*.jsonl.zst", f"--data.eval_files={text}/val.jsonl.zst")
    tokenizer = text / "tokenizer.model"
    return (*flags, f"--tokenizer.path={tokenizer}") if sizes.takes_tokenizer and tokenizer.exists() else flags


def _flags(sizes: Sizes, folder: Path, *, steps: int, every: int) -> Flags:
    settings: dict[str, object] = {
        "train.steps": steps,
        "checkpoint.every": every,
        "eval.every": max(1, steps // 2),
        "eval.full_batches": 16,
        "wandb.mode": "disabled",
    }
    return (*sizes.learner, *_text_flags(sizes, folder), *(f"--{key}={value}" for key, value in settings.items()))


def resume(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Compare an uninterrupted run with one that a signal stops and that is started again."""
    findings.attempt("resume", lambda: _resume(sizes, folder))


def _resume(sizes: Sizes, folder: Path) -> dict[str, Any]:
    require_deepspeed()
    steps, every = sizes.resume_steps, sizes.resume_steps // 3
    flags = (*_flags(sizes, folder, steps=steps, every=every), "--train.compile=never")
    straight, broken = _fresh(folder / "run-straight"), _fresh(folder / "run-broken")
    _train(flags, straight)
    flags = (
        *(flag for flag in flags if not flag.startswith("--tokenizer.path")),
        f"--tokenizer.path={straight.tokenizer}",
    )
    began = time.perf_counter()
    _train(flags, broken, fault=f"forward:term:0:{every + 1}", expected=STOP_EXIT)
    _train(flags, broken)
    differences = compare_runs(straight, broken)
    return {
        "steps": steps,
        "stopped_in_step": every + 1,
        "seconds": time.perf_counter() - began,
        "is_exact": not any(differences.values()),
        "differences": {name: found and asdict(found) for name, found in differences.items()},
    }


def learn(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Train on the carried text, and record the loss curve."""
    flags = _flags(sizes, folder, steps=sizes.learn_steps, every=sizes.learn_steps)
    config = load_config(list(flags))
    findings.record("setting", {
        "loop": loop_name(),
        "parameters": parameters(config.model),
        "batch": config.train.global_batch_size,
        "length": config.data.sequence_length,
        "steps": config.steps,
    })  # fmt: skip
    train = _learn_plainly if deepspeed_obstacle() else _learn
    findings.attempt("learning", lambda: train(flags, folder))


def _learn(flags: Flags, folder: Path) -> dict[str, Any]:
    run = _fresh(folder / "run-learning")
    began = time.perf_counter()
    _train(flags, run)
    rows = read_metrics(run.metrics)
    return {
        "seconds": time.perf_counter() - began,
        "curve": [(row["step"], row["loss"]) for row in rows],
        "evaluations": [(row["step"], row["eval/loss"]) for row in rows if row.get("eval/loss") is not None],
        "tokens_per_second": rows[-1]["tokens_per_second"],
        "mfu": rows[-1]["mfu"],
    }


def _learn_plainly(flags: Flags, folder: Path) -> dict[str, Any]:
    """The same rows and rates in a plain loop, without evaluations."""
    config, world, began = load_config(list(flags)), distributed.World(), time.perf_counter()
    distributed.start_hosts(world, threads=config.run.threads)
    directory = _fresh(folder / "run-plain")
    directory.create()
    inputs = Inputs.open(config, directory, world, form=form_of(config))
    loop = PlainLoop(config, device=device(), dtype=torch.bfloat16, compiled=False)
    state, curve = RunState(), []
    with inputs.loader(state) as loader:
        for batch in loader:
            ids = torch.stack([torch.from_numpy(part.ids.astype("int64")) for part in batch.micro_batches])
            loss = loop.step(ids.to(loop.device), learning_rate=next_learning_rate(config, state))
            state = state.after(consumed=batch.consumed, rows=config.train.global_batch_size, updated=True)
            curve.append((state.step, loss.item()))
            if state.step == config.steps:
                break
    distributed.stop()
    return {"seconds": time.perf_counter() - began, "curve": curve, "evaluations": []}


def _fresh(path: Path) -> RunDirectory:
    """The directory of a run that has not begun, whatever an earlier proof left there."""
    shutil.rmtree(path, ignore_errors=True)
    return RunDirectory(path)


def _train(flags: Flags, run: RunDirectory, *, fault: str = "", expected: int = 0) -> None:
    """Run `lamda pretrain`, with a fault (`lamda.training.fault_injection`). Raises UserError for another exit code."""
    log = run.path.with_suffix(".log")
    environment = {**os.environ, "LAMDA_ALLOW_FAULTS": "1" if fault else "", "LAMDA_FAULT": fault}
    with log.open("ab") as out:
        command = [sys.executable, "-m", "lamda.launch.pretrain", *flags, f"--run.dir={run.path}"]
        code = subprocess.run(command, stdout=out, stderr=out, env=environment, check=False).returncode
    if code != expected:
        last = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise UserError("\n".join([f"{run.path}: ended with {code} instead of {expected}:", *last]))
