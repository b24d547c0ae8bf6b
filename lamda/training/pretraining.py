"""A pre-training run from start to end: prepare, train, evaluate, show."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lamda import distributed
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.data.block_files import BlockFolder
from lamda.data.card import Source, load_card
from lamda.data.compression import compressed_bits_per_byte
from lamda.data.corpus import Corpus, fingerprint, open_corpus, packing_of, require_a_batch
from lamda.data.files import resolve
from lamda.data.held_out import HeldOut
from lamda.data.loader import Loader
from lamda.data.run_tokenizer import ensure_tokenizer
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World
from lamda.inference.generation import generate
from lamda.training import checkpoint
from lamda.training.engine import Engine
from lamda.training.evaluation import Scores, held_out_bytes, table
from lamda.training.loop import Run
from lamda.training.metrics import MetricsFile
from lamda.training.progress import TrainingProgress
from lamda.training.resume import choose_start
from lamda.training.run_directory import RunDirectory
from lamda.training.state import RunState
from lamda.training.wandb_mirror import WandbMirror

log = logging.getLogger(__name__)

COMPARED_BYTES = 32_000_000
"""Held-out text up to this size is also compressed, to set the bits per byte beside something known."""


def pretrain(config: Config, world: World) -> None:
    """Train `config` to its end, from wherever the run directory stands. Raises UserError."""
    directory = RunDirectory(Path(config.run.dir))
    device = distributed.start(world, threads=config.run.threads)
    with ExitStack() as stack:
        stack.callback(distributed.stop)
        distributed.on_main(world, directory.create)
        if world.is_main:
            _log_to(directory.log)
        distributed.on_main(world, lambda: stack.enter_context(directory.lock()) and None)
        start = choose_start(config, directory, world)
        if start.state.step >= config.steps:
            if world.is_main:
                print(f"{directory.path}: finished, {start.state.step} steps; raise train.steps to go on")
            return
        text = _open_text(config, directory, world)
        state = start.check_data(fingerprint(text.corpus, config, text.tokenizer))
        try:
            _run(config, world, directory, device, start.path, state, text)
        except BaseException as error:
            if world.is_main:
                directory.write_status("failed", reason=f"{type(error).__name__}: {error}")
            raise


@dataclass(frozen=True)
class _Text:
    """What the run reads: its lanes, its tokenizer, and the domains whose loss is told apart."""

    corpus: Corpus
    tokenizer: Tokenizer
    domains: tuple[str, ...]


def _open_text(config: Config, directory: RunDirectory, world: World) -> _Text:
    """The corpus and the tokenizer; rank 0 goes first and makes what is missing."""

    def prepare() -> list[str]:
        corpus = open_corpus(config.data)
        for source in _validation(config):
            resolve(source)
        if config.model.weights is not None:
            checkpoint.check_weights(Path(config.model.weights), config.model)
        tokenizer = ensure_tokenizer(config, target=directory.tokenizer, corpus=corpus)
        require_a_batch(corpus, config, tokenizer)
        return corpus.domains()

    domains = distributed.on_main(world, prepare)
    corpus, tokenizer = distributed.agree(
        world, lambda: (open_corpus(config.data), Tokenizer.load(directory.tokenizer))
    )
    return _Text(corpus, tokenizer, tuple(domains))


def _run(
    config: Config,
    world: World,
    directory: RunDirectory,
    device: torch.device,
    checkpoint_path: Path | None,
    state: RunState,
    text: _Text,
) -> None:
    engine = Engine(config, world=world, device=device, domains=len(text.domains) + 1)
    if checkpoint_path is not None:
        checkpoint.load(checkpoint_path, engine=engine)
    elif config.model.weights is not None:
        checkpoint.load_weights_alone(Path(config.model.weights), engine=engine)
    if world.is_main:
        (directory.path / "config.yaml").write_text(to_yaml(config), "utf-8")
        directory.write_status("running", step=state.step, steps=config.steps)
    with ExitStack() as stack:
        loader = stack.enter_context(_loader(config, world, text, state))
        progress = stack.enter_context(TrainingProgress(done=state.step, steps=config.steps, visible=world.is_main))
        if checkpoint_path is not None:
            progress.say(f"going on from {checkpoint_path}")
        report = _Reporter(config, world, directory, state, progress, stack)
        run = Run(
            config=config,
            world=world,
            directory=directory,
            engine=engine,
            loader=loader,
            held_out=_held_out(config, text.tokenizer),
            domains=text.domains,
            state=replace(state, wandb_id=report.wandb_id),
        )
        scores = run.train(report, notice=progress.say)
        _finish(run, scores, text.tokenizer, progress)
        if world.is_main:
            directory.write_status("finished", step=run.state.step, steps=config.steps)


class _Reporter:
    """Sends a finished step's row to the file, the mirror and the eye; on rank 0 alone."""

    def __init__(
        self,
        config: Config,
        world: World,
        directory: RunDirectory,
        state: RunState,
        progress: TrainingProgress,
        stack: ExitStack,
    ) -> None:
        self._progress = progress
        self._file = self._mirror = None
        self.wandb_id = state.wandb_id
        if world.is_main:
            self._file = stack.enter_context(
                MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=state.step)
            )
            self._mirror = WandbMirror(config, folder=directory.path, run_id=state.wandb_id, step=state.step)
            self.wandb_id = self._mirror.run_id
            stack.callback(self._mirror.finish)

    def __call__(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(row)
            self._mirror.log(row)
            self._progress.show(row)


def _loader(config: Config, world: World, text: _Text, state: RunState) -> Loader:
    return Loader(
        text.corpus,
        text.tokenizer,
        packing=packing_of(config),
        batch=config.train.global_batch_size,
        micro_batch=config.train.micro_batch_size,
        rank=world.rank,
        world=world.size,
        consumed=state.consumed,
        skipped=state.skipped,
        cursors=state.cursors,
        threads=config.data.threads,
        domains=text.domains,
        document_mask=config.data.document_mask,
        ready=BlockFolder.of(config.data.blocks, state.fingerprint) if config.data.blocks else None,
    )


def _validation(config: Config) -> tuple[Source, ...]:
    sources = load_card(config.data).validation
    if not sources and config.eval.every is not None:
        raise UserError(
            f"eval.every is {config.eval.every}, but card {config.data.corpus!r} has no validation text; set "
            "data.eval_files, or take eval.every out"
        )
    return sources


def _held_out(config: Config, tokenizer: Tokenizer) -> HeldOut | None:
    sources = _validation(config)
    return HeldOut(sources, tokenizer, config.data.sequence_length) if sources else None


def _finish(run: Run, scores: Scores | None, tokenizer: Tokenizer, progress: TrainingProgress) -> None:
    """Show the last evaluation, a sample, and where everything is."""
    if scores is not None:
        for line in table(scores.report()):
            progress.say(line)
        if run.world.is_main and (text := held_out_bytes(run.held_out, limit=COMPARED_BYTES)):
            others = ", ".join(f"{name} {bits:.4f}" for name, bits in compressed_bits_per_byte(text).items())
            progress.say(f"bits per byte on the same text: {others}")
    sample = _sample(run, tokenizer)
    if run.world.is_main:
        run.directory.samples.mkdir(exist_ok=True)
        file = run.directory.samples / f"step-{run.state.step:08d}.txt"
        file.write_text(sample, "utf-8")
        progress.say(f"a continuation, as it came:\n{sample}")
        progress.say(
            f"everything is in {run.directory.path}; to go on, run the same command with a larger train.steps or "
            "train.tokens"
        )


def _sample(run: Run, tokenizer: Tokenizer) -> str:
    """A continuation of the first held-out words, or of an empty document."""
    prompt = ""
    if run.held_out is not None:
        beginning = next(iter(run.held_out.documents())).text[:200]
        prompt = "".join(beginning.splitlines(keepends=True)[:-1]) or beginning
    ids = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
    engine = run.engine
    with engine.evaluating(), engine.whole(*engine.model.parameters()):
        (new,) = generate(
            engine.model,
            torch.tensor([ids], device=engine.device),
            max_new_tokens=100,
            temperature=0.8,
            seed=run.config.run.seed,
            stop_ids=(tokenizer.end_of_document,),
        )
    return f"{prompt}⟫{tokenizer.decode(new)}\n"


def _log_to(path: Path) -> None:
    """Warnings go to the console and to train.log."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    root = logging.getLogger("lamda")
    for handler in (logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler(sys.stderr)):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
