"""`lamda test-resume`: test with the user's configuration that a killed run ends like an uninterrupted one.

Three short runs through DeepSpeed's launcher: one uninterrupted, one killed with SIGKILL and resumed, one killed and
resumed on another number of ranks. Then their metrics and checkpoints are compared.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lamda.cluster.processes import Launch
from lamda.cluster.restarts import exit_text
from lamda.cluster.short_runs import existing_tokenizer, flags_of, make_folder, say, short_run
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.console import show_table
from lamda.distributed import free_port
from lamda.storage.metrics import last_row, read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import handling_signals

if TYPE_CHECKING:
    from lamda.cluster.compare import FirstDifference

STEPS, CHECKPOINTS = 12, 4
POLL_SECONDS = 0.01
LOG_LINES = 25
EXACT_MICRO_BATCHES = 2
"""Up to this many micro-batches per step, gradients do not depend on the number of ranks: two terms have one order."""


def parser() -> ConfigParser:
    """The options of `lamda test-resume`."""
    parser = ConfigParser("lamda test-resume", epilog="exit code: 0 if all runs are equal, 1 if one differs")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to run on; default: all GPUs, or 2 without one")
    parser.add_argument("--others", type=int, metavar="M", help="ranks that the last run resumes on; default: half")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="S", help="steps of each run; default %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the steps at which runs are killed")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """Arguments as in the table of commands; 0 all equal, 1 something differs. Raises UserError."""
    options, flags = parser().parse_known_args(argv)
    config = load_config(flags)
    ranks, others = choose_ranks(config, ranks=options.ranks, others=options.others)
    if options.steps < CHECKPOINTS:
        raise UserError(f"--steps {options.steps}: the test needs at least {CHECKPOINTS} steps")
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    test = ResumeTest(
        flags, config, folder=make_folder(config, purpose="proof"), steps=options.steps, seed=seed, keep=options.keep
    )
    try:
        with handling_signals(signal.default_int_handler):
            trials = test.run(ranks, others)
    except (KeyboardInterrupt, OSError):
        if not options.keep:
            shutil.rmtree(test.folder, ignore_errors=True)
        raise
    is_exact = all(trial.is_exact for trial in trials)
    kept = str(test.folder) if options.keep or not is_exact else None
    if kept is None:
        shutil.rmtree(test.folder)
    result = {"steps": options.steps, "seed": seed, "exact": is_exact, "kept": kept}
    if options.json:
        print(json.dumps({**result, "killed_on": ranks, "resumed": [asdict(trial) for trial in trials]}, indent=2))
    else:
        show_trials(ranks, trials)
        print(f"{'nothing differs' if is_exact else 'it differs'}{f'; everything is in {kept}' if kept else ''}")
        if hint := rounding_hint(config, ranks, trials):
            print(hint)
    return 0 if is_exact else 1


@dataclass(frozen=True)
class Trial:
    """A run killed after step `killed_after` and resumed on `ranks` ranks from checkpoint `went_on_from`."""

    ranks: int
    killed_after: int
    went_on_from: str
    differences: dict[str, FirstDifference | None]

    @property
    def is_exact(self) -> bool:
        """Whether nothing differs from the uninterrupted run."""
        return not any(self.differences.values())


class ResumeTest:
    """The runs of a test in `folder`; runs that are equal are deleted unless `keep`."""

    def __init__(self, flags: list[str], config: Config, *, folder: Path, steps: int, seed: int, keep: bool) -> None:
        self.folder = folder
        self._steps, self._keep = steps, keep
        self._draw = random.Random(seed)
        self._every = steps // CHECKPOINTS
        self._tokenizer = existing_tokenizer(config)
        self._flags = [*flags, *flags_of(short_run(folder, steps=steps, every=self._every))]
        say(f"{folder}: {steps} steps per run, a checkpoint every {self._every}; kill times from --seed {seed}")

    def run(self, ranks: int, others: int | None) -> list[Trial]:
        """Run uninterrupted on `ranks`, then kill and resume on each number of ranks. Raises UserError."""
        resumed_on = [ranks] if others is None else [ranks, others]
        self._label = f"run 1 of {1 + len(resumed_on)}"
        straight = RunDirectory(self.folder / "straight")
        say(f"{self._label}: uninterrupted on {_ranks(ranks)}")
        self._finish(straight, ranks)
        self._tokenizer = self._tokenizer or str(straight.tokenizer)
        trials = []
        for number, again in enumerate(resumed_on, start=2):
            self._label = f"run {number} of {1 + len(resumed_on)}"
            say(f"{self._label}: killed on {_ranks(ranks)}, resumed on {_ranks(again)}")
            trials.append(self._try(straight, ranks, again))
        return trials

    def _try(self, straight: RunDirectory, ranks: int, again: int) -> Trial:
        from lamda.cluster.compare import compare_runs

        broken = RunDirectory(self.folder / f"resumed-on-{again}")
        killed_after = self._kill(broken, ranks)
        newest = (broken.checkpoints / "LATEST").read_text("utf-8")
        say(f"{self._label}: killed after step {killed_after}; resuming from {newest}")
        manifest = broken.checkpoints / newest / "manifest.json"
        written = manifest.stat().st_mtime_ns
        self._finish(broken, again)
        if not manifest.exists() or manifest.stat().st_mtime_ns != written:
            raise UserError(
                f"{broken.path}: the run did not resume from {newest} but from an earlier step; see train.log"
            )
        trial = Trial(again, killed_after, newest, compare_runs(straight, broken))
        if trial.is_exact and not self._keep:
            shutil.rmtree(broken.path)
        return trial

    def _finish(self, run: RunDirectory, ranks: int) -> None:
        """Train to the last step."""
        ended = self._train(run, ranks)
        if run.read_status().get("status") != "finished":
            self._fail(run, f"failed ({ended})")

    def _kill(self, run: RunDirectory, ranks: int) -> int:
        """Send SIGKILL to all ranks at a random time between the first checkpoint and the last step.

        Returns the last step in metrics.jsonl.
        """
        goal = self._draw.randint(self._every, self._steps - self._every)
        share = self._draw.random()
        latest = run.checkpoints / "LATEST"
        ended = self._train(run, ranks, until=lambda step: step >= goal and latest.exists(), share=share)
        last = _last_step(run)
        if last >= self._steps:
            raise UserError(f"{run.path}: finished before it could be killed; give more --steps than {self._steps}")
        if not latest.exists():
            self._fail(run, f"ended before it could be killed ({ended})")
        return last

    def _train(
        self, run: RunDirectory, ranks: int, *, until: Callable[[int], bool] = lambda step: False, share: float = 0.0
    ) -> str:
        """Train until the run ends, or kill it in the step after one for which `until` holds; returns how it ended.

        share: the part of that step's time that passes before.
        """
        settings: dict[str, object] = {"run.dir": run.path}
        if self._tokenizer:
            settings["tokenizer.path"] = self._tokenizer
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *_devices(ranks)]
        command += ["--master_port", str(free_port()), "--module", "lamda.launch.pretrain"]
        launch = Launch([*command, *self._flags, *flags_of(settings)], run=run.path, log=self._log(run))
        try:
            shown, shown_at = _last_step(run), time.monotonic()
            while launch.poll() is None:
                step = _last_step(run)
                if until(step):
                    time.sleep(share * read_metrics(run.metrics)[-1]["step_seconds"])
                    break
                if step != shown and (step == self._steps or time.monotonic() - shown_at >= 1):
                    shown, shown_at = step, time.monotonic()
                    say(f"{self._label}: step {step} of {self._steps}")
                time.sleep(POLL_SECONDS)
        finally:
            launch.kill()
        return exit_text(launch.exit_code())

    def _log(self, run: RunDirectory) -> Path:
        return self.folder / f"{run.path.name}.log"

    def _fail(self, run: RunDirectory, failure: str) -> NoReturn:
        log = self._log(run)
        last = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise UserError("\n".join([f"{self._label} {failure}; the last lines of {log}:", *last]))


def choose_ranks(config: Config, *, ranks: int | None, others: int | None) -> tuple[int, int | None]:
    """The number of ranks to run on, and another number to resume on (None: none possible). Raises UserError.

    By default all GPUs, or 2 ranks without GPUs, and the largest number up to half of them that can share a batch.
    """
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count() or 2
    for name, number in (("--ranks", ranks), ("--others", others)):
        if number is not None:
            if number < 1:
                raise UserError(f"{name} {number}: a run needs at least 1 rank")
            micro_batches_per_rank(config.train, world_size=number)
    if others == ranks:
        raise UserError(f"--others {others}: is the same as --ranks; give another number")
    if others is None and ranks > 1:
        micro_batches = config.train.global_batch_size // config.train.micro_batch_size
        others = next(fewer for fewer in range(ranks // 2, 0, -1) if micro_batches % fewer == 0)
    return ranks, others


def rounding_hint(config: Config, ranks: int, trials: list[Trial]) -> str:
    """Why another number of ranks may round differently, if only that can explain the differences; else empty."""
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    differing = [trial for trial in trials if not trial.is_exact]
    if micro_batches <= EXACT_MICRO_BATCHES or not differing or any(trial.ranks == ranks for trial in differing):
        return ""
    if any(trial.differences["samples"] for trial in differing):
        return ""
    return (
        f"on {_ranks(ranks)} nothing differs, and all samples are equal; another number of ranks adds a step's "
        f"{micro_batches} micro-batches in another order, which rounds some sums differently (docs/reliability.md)"
    )


def show_trials(ranks: int, trials: list[Trial]) -> None:
    """Print one line per comparison, one column per resumed run."""
    header = [f"killed on {_ranks(ranks)}, resumed", *(f"on {_ranks(trial.ranks)}" for trial in trials)]
    rows = [[name, *(describe(trial.differences[name]) for trial in trials)] for name in trials[0].differences]
    show_table(header, rows, left=range(len(header)))


def describe(difference: FirstDifference | None) -> str:
    """A difference in words."""
    if difference is None:
        return "equal"
    size = "" if difference.largest is None else f" by {difference.largest:.3g} at most"
    return f"differs from step {difference.step}{size}"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _devices(ranks: int) -> list[str]:
    """GPUs by number if CUDA_VISIBLE_DEVICES is set: the launcher ignores it and takes the first GPUs otherwise."""
    visible = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    return ["--include", f"localhost:{','.join(visible[:ranks])}"] if visible else ["--num_gpus", str(ranks)]


def _last_step(run: RunDirectory) -> int:
    """The last step in metrics.jsonl, 0 if there is none."""
    row = last_row(run.metrics)
    return row["step"] if row else 0
