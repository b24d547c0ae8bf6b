"""What a run reads: its lanes, its tokenizer and its held-out text, opened once and checked before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamda import distributed
from lamda.best_effort import BestEffort
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.block_files import BlockFolder
from lamda.data.card import Source, load_card
from lamda.data.corpus import Corpus, fingerprint, open_corpus, packing_of, require_a_batch
from lamda.data.documents import Form
from lamda.data.files import nothing
from lamda.data.held_out import require_documents
from lamda.data.loader import Loader, alone
from lamda.data.resolving import require_here
from lamda.data.run_tokenizer import ensure_tokenizer
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import SourceOrder
from lamda.distributed import World
from lamda.durable import Progress
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.start import check_weights


@dataclass(frozen=True)
class Text:
    """The training text and its tokenizer.

    domains: those whose loss is told apart. fingerprint: all that the order of samples depends on.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    fingerprint: dict[str, Any]

    @classmethod
    def open(
        cls,
        config: Config,
        directory: RunDirectory,
        world: World,
        *,
        form: Form,
        at: Callable[[str], object] = lambda phase: None,
        progress: Progress = lambda: None,
        on_wait: Progress = lambda: None,
    ) -> Text:
        """Rank 0 looks for the files, makes what is missing and hands the result to all.

        at: called on every rank with the name of each part of the work. progress: called as a part goes on. on_wait:
        called while a server is waited for, now and when the text is read, from any thread.
        Raises UserError for whatever the run would fail on later.
        """

        def open_all() -> Corpus:
            corpus = open_corpus(config.data, form=form, on_wait=on_wait)
            for source in validation(config):
                require_documents(source, form=form, on_wait=on_wait)
            if config.model.weights is not None:
                check_weights(Path(config.model.weights), config.model)
            return corpus.waiting(nothing)  # what this rank's waits call is no other rank's

        def prepare() -> tuple[list[str], dict[str, Any]]:
            tokenizer = Tokenizer.load(directory.tokenizer)
            require_a_batch(corpus, config, tokenizer)
            return corpus.domains(), fingerprint(corpus, config, tokenizer)

        at("corpus")
        corpus = distributed.on_main(world, open_all).waiting(on_wait)
        distributed.agree(world, lambda: require_here(corpus.files))
        at("tokenizer")
        distributed.on_main(
            world,
            lambda: ensure_tokenizer(config, target=directory.tokenizer, corpus=corpus, progress=progress) and None,
        )
        at("text")
        domains, found = distributed.on_main(world, prepare)
        tokenizer = distributed.agree(world, lambda: Tokenizer.load(directory.tokenizer))
        return cls(corpus, tokenizer, tuple(domains), found)

    def loader(
        self,
        config: Config,
        world: World,
        state: RunState,
        *,
        on_window: Callable[[int, SourceOrder], object] = lambda source, order: None,
    ) -> Loader:
        """This rank's steps from `state` on. on_window: as the loader's."""
        return Loader(
            self.corpus,
            self.tokenizer,
            packing=packing_of(config),
            seed=config.run.seed,
            batch=config.train.global_batch_size,
            micro_batch=config.train.micro_batch_size,
            rank=world.rank,
            world=world.size,
            consumed=state.consumed,
            skipped=state.skipped,
            order=state.order,
            exchange=distributed.gather if world.size > 1 else alone,
            threads=config.data.threads,
            domains=self.domains,
            document_mask=config.data.separates_documents,
            ready=self._ready_blocks(config, state),
            on_window=on_window,
        )

    def _ready_blocks(self, config: Config, state: RunState) -> BlockFolder | None:
        folder = config.data.cache_dir
        if folder is None:
            return None
        keeping = BestEffort(
            f"data.cache_dir {folder}: not all blocks are kept", then="training continues without them"
        )
        return BlockFolder.of(folder, state.fingerprint, keeping=keeping)


def validation(config: Config) -> tuple[Source, ...]:
    """The sources of the validation text. Raises UserError where there is none and evaluations are asked for."""
    sources = load_card(config.data).validation
    if not sources and config.eval.every is not None:
        why = (
            f"card {config.data.corpus!r} has no validation text"
            if config.data.files is None
            else "text of data.files has no validation text but your own"
        )
        raise UserError(
            f"eval.every is {config.eval.every}, but {why}; set data.eval_files to files that are not trained on, or "
            "--eval.every null"
        )
    return sources
