"""`lamda doctor --smoke`: everything that a long run needs of N ranks, in short: check, train, kill a rank, resume.

The checks of the doctor, with its all-reduce; a run of a few steps; the same run, killed while it writes its second
checkpoint; its resume from the first one, compared bit for bit. All ranks compute in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar, cast

from lamda.cluster.checks.finding import EXIT_CODES, LEVELS
from lamda.cluster.processes import EMPTY
from lamda.cluster.rank_group import Ended, RankGroup
from lamda.cluster.resume_test import describe
from lamda.cluster.short_runs import existing_tokenizer, flags_of, make_folder, say, short_run
from lamda.config.errors import RunError, UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.console import show_table
from lamda.distributed import World, read_world
from lamda.storage.manifest import complete
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import handling_signals

STEPS, EVERY = 4, 1
ACCUMULATION = 2
"""Micro-batches of a rank per step."""
TRAINING = "lamda.launch.pretrain"
FIRST = f"step-{EVERY:08d}"
"""The only checkpoint before the kill."""

T = TypeVar("T")

Verdict = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Part:
    """A line of the report. figures: its rates and times, for programs."""

    name: str
    verdict: Verdict
    text: str
    seconds: float | None = None
    figures: dict[str, float] = field(default_factory=dict)


class PartFailedError(RunError):
    """A part failed; those that follow cannot run."""


def main(flags: list[str], *, ranks: int | None, as_json: bool) -> int:
    """Smoke-test this machine, or all ranks of the launcher; 0 if all parts passed, 1 if one failed. Raises UserError.

    flags: of a configuration. ranks: on this machine, by default one per GPU, or 2 without a GPU.
    """
    config, world = load_config(flags), read_world()
    group = RankGroup(world, size=_choose_ranks(world, ranks))
    with handling_signals(signal.default_int_handler):
        smoke = Smoke(flags, config, group, folder=_shared_folder(config, group))
        try:
            parts = smoke.run()
        except BaseException:
            smoke.remove()
            raise
    passed = all(part.verdict == "ok" for part in parts)
    if passed:
        smoke.remove()
    if group.is_main_process:
        show(parts, ranks=group.size, kept=None if passed else smoke.folder, as_json=as_json)
    group.stop()
    return 0 if passed else 1


class Smoke:
    """The parts of the test, whose runs and logs are in `folder`. Every process of the group makes the same calls."""

    def __init__(self, flags: Sequence[str], config: Config, group: RankGroup, *, folder: Path) -> None:
        self.folder, self._group = folder, group
        self.straight, self.resumed = RunDirectory(folder / "straight"), RunDirectory(folder / "resumed")
        self._tokenizer, self._limit_seconds = existing_tokenizer(config), config.run.hang_timeout_seconds
        rows = config.train.micro_batch_size * ACCUMULATION * group.size
        settings = short_run(folder, steps=STEPS, every=EVERY) | {"train.global_batch_size": rows}
        self._flags = [*flags, *flags_of(settings)]

    def run(self) -> list[Part]:
        """All parts in their order, up to the first that fails."""
        done: list[Part] = []
        for names, run in (
            (("checks", "all-reduce"), self.check),
            (("training",), self.train),
            (("kill",), self.kill),
            (("resume",), self.resume),
        ):
            began, size = time.monotonic(), self._group.size
            try:
                if any(part.verdict == "failed" for part in done):
                    done += [Part(name, "not run", "") for name in names]
                    continue
                if self._group.is_main_process:
                    say(f"{' and '.join(names)} on {size} rank{'s' if size > 1 else ''}")
                done += run()
            except PartFailedError as failure:
                seconds = time.monotonic() - began
                done += [
                    Part(names[0], "failed", str(failure), seconds),
                    *(Part(each, "not run", "") for each in names[1:]),
                ]
        return done

    def check(self) -> list[Part]:
        """The doctor on all ranks; its all-reduce has a line of its own."""
        codes = EXIT_CODES.values()
        ended = self._start("lamda.cluster.doctor", "--json", run=self.straight, name="checks", well=codes)
        if failure := ended.failure():
            raise PartFailedError(failure)
        return self._on_main(lambda: _findings(ended))

    def train(self) -> list[Part]:
        """An uninterrupted run."""
        ended = self._finish(self.straight, name="training")
        self._tokenizer = self._tokenizer or str(self.straight.tokenizer)
        return self._on_main(lambda: [_training(self.straight, ended.seconds)])

    def kill(self) -> list[Part]:
        """The same run, whose last rank is killed while it writes the second checkpoint."""
        last, step = self._group.size - 1, 2 * EVERY
        others = os.environ.get("LAMDA_FAULT", "")
        fault = {"LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": f"{others},save.written:kill:{last}:{step}"}
        ended = self._start(TRAINING, run=self.resumed, name="kill", variables=fault)
        if ended.codes[last] != -signal.SIGKILL:
            raise PartFailedError(ended.failure() or f"rank {last} wrote no checkpoint in step {step}")
        text = f"rank {last} killed while it wrote the checkpoint of step {step}; "
        return self._on_main(lambda: [Part("kill", "ok", text + _only_checkpoint(self.resumed), ended.seconds)])

    def resume(self) -> list[Part]:
        """Resume the killed run, and compare it with the uninterrupted one."""
        before = self._on_main(lambda: _written_at(self.resumed))
        ended = self._finish(self.resumed, name="resume")
        return self._on_main(lambda: [self._compare(before, ended.seconds)])

    def remove(self) -> None:
        """Delete everything."""
        if self._group.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(
        self,
        module: str,
        *options: str,
        run: RunDirectory,
        name: str,
        variables: Mapping[str, str] = EMPTY,
        well: Collection[int] = (0,),
    ) -> Ended:
        flags = flags_of({"run.dir": run.path} | ({"tokenizer.path": self._tokenizer} if self._tokenizer else {}))
        return self._group.run(
            ["-m", module, *options, *self._flags, *flags],
            name=name,
            run=run.path,
            limit_seconds=self._limit_seconds,
            variables=variables,
            well=well,
        )

    def _finish(self, run: RunDirectory, *, name: str) -> Ended:
        """Train to the last step."""
        ended = self._start(TRAINING, run=run, name=name)
        if failure := ended.failure():
            raise PartFailedError(failure)
        return ended

    def _compare(self, before: int, seconds: float) -> Part:
        from lamda.cluster.compare import compare_runs

        if _written_at(self.resumed) != before:
            raise PartFailedError(f"the run did not resume from {FIRST}; see {self.folder}/resume-rank-0.log")
        differences = compare_runs(self.straight, self.resumed)
        if any(differences.values()):
            raise PartFailedError("; ".join(f"{name}: {describe(each)}" for name, each in differences.items()))
        return Part("resume", "ok", f"from {FIRST}; equal bit for bit: {', '.join(differences)}", seconds)

    def _on_main(self, action: Callable[[], T]) -> T:
        """The result of the main process's `action`, on every process. Raises PartFailedError on all of them."""
        result, problem = None, None
        if self._group.is_main_process:
            try:
                result = action()
            except (RunError, UserError, OSError) as error:
                problem = str(error)
        result, problem = self._group.broadcast((result, problem))
        if problem is not None:
            raise PartFailedError(problem)
        return cast("T", result)


def show(parts: Sequence[Part], *, ranks: int, kept: Path | None, as_json: bool) -> None:
    """Print the report. kept: the folder, where a part failed."""
    if as_json:
        content = {
            "passed": kept is None,
            "ranks": ranks,
            "kept": kept and str(kept),
            "parts": list(map(asdict, parts)),
        }
        print(json.dumps(content, indent=2), flush=True)
        return
    first_lines = [part.text.partition("\n")[0] for part in parts]
    rows = [
        [part.name, part.verdict, "-" if part.seconds is None else f"{part.seconds:.1f}", text]
        for part, text in zip(parts, first_lines, strict=True)
    ]
    show_table(["part", "verdict", "seconds", "result"], rows, left=(0, 1, 3))
    for part in parts:
        if more := part.text.partition("\n")[2]:
            print(more)
    if kept:
        print(f"everything is in {kept}")


def _choose_ranks(world: World, ranks: int | None) -> int:
    """The number of ranks. Raises UserError."""
    if world.launched:
        if ranks is not None:
            raise UserError(f"--ranks {ranks}: the launcher has started {world.world_size}; leave --ranks out")
        return world.world_size
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks}: must be at least 1")
    import torch

    return ranks or torch.cuda.device_count() or 2


def _shared_folder(config: Config, group: RankGroup) -> Path:
    """A new folder beside run.dir, which all processes see. Raises UserError on all of them."""
    made: Path | None = None
    problem = ""
    if group.is_main_process:
        try:
            made = make_folder(config, purpose="smoke").absolute()
        except UserError as error:
            problem = str(error)
    made, problem = group.broadcast((made, problem))
    if made is None:
        raise UserError(problem)
    if not all(group.gather(made.is_dir())):
        raise UserError(f"{made}: not all ranks see it; choose a run.dir on a file system that all nodes share")
    return made


def _findings(ended: Ended) -> list[Part]:
    """The doctor's findings, from the output of rank 0."""
    output = ended.logs[0].read_text("utf-8")
    start = output.find("{\n")
    if start < 0:
        raise PartFailedError(ended.failure() or f"the doctor said nothing; see {ended.logs[0]}")
    checks = json.JSONDecoder().raw_decode(output, start)[0]["checks"]
    link = checks.pop("all-reduce", {"level": "ok", "text": "not needed: one rank", "rate": None})
    by_level = {level: [name for name, each in checks.items() if each["level"] == level] for level in LEVELS}
    text = f"{len(by_level['ok'])} of {len(checks)} ok"
    text += f"; warnings: {', '.join(by_level['warning'])}" if by_level["warning"] else ""
    failures = [f"{name}: {checks[name]['text']}" for name in by_level["failure"]]
    return [
        Part("checks", "failed" if failures else "ok", "; ".join([*failures, text]), ended.seconds),
        Part(
            "all-reduce",
            "failed" if link["level"] == "failure" else "ok",
            link["text"],
            figures={} if link["rate"] is None else {"bytes_per_second": link["rate"]},
        ),
    ]


def _training(run: RunDirectory, seconds: float) -> Part:
    rows = read_metrics(run.metrics)
    losses = [row["loss"] for row in rows]
    if len(rows) != STEPS or None in losses:
        raise PartFailedError(f"{run.metrics}: {len(rows)} of {STEPS} steps, losses {losses}")
    step, rate = (median(row[name] for row in rows[1:]) for name in ("step_seconds", "tokens_per_second"))
    text = f"{STEPS} steps, {step:.3g} s each, {rate:,.0f} tokens/s; loss {losses[0]:.3f} to {losses[-1]:.3f}"
    return Part("training", "ok", text, seconds, {"step_seconds": step, "tokens_per_second": rate})


def _only_checkpoint(run: RunDirectory) -> str:
    names = [path.name for path in complete(run.checkpoints)]
    if names != [FIRST]:
        raise PartFailedError(f"{run.checkpoints}: {names} are complete, and not {FIRST} alone")
    return f"{FIRST} is complete"


def _written_at(run: RunDirectory) -> int:
    """When the first checkpoint was written: a run that starts from the beginning writes it again."""
    return (run.checkpoints / FIRST / "manifest.json").stat().st_mtime_ns
