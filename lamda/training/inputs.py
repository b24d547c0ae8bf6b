"""What a run reads: corpus, tokenizer, validation text and initial weights, all checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lamda import distributed
from lamda.best_effort import BestEffort
from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data import split
from lamda.data.card import Source, load_card
from lamda.data.corpus import Corpus, fingerprint, packing_of, require_a_batch, source_identities
from lamda.data.documents import Form
from lamda.data.files import no_op
from lamda.data.held_out import require_documents
from lamda.data.loader import Loader, alone
from lamda.data.resolving import require_here
from lamda.data.row_cache import RowCache
from lamda.data.split import held_out_source
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import ensure_tokenizer
from lamda.data.windows import SourceOrder
from lamda.distributed import World
from lamda.durable import Progress
from lamda.inference.loading import WEIGHTS, find_checkpoint, saved_config
from lamda.model.weights import check_shapes, weight_shapes
from lamda.storage import manifest
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState


@dataclass(frozen=True)
class Inputs:
    """The training text and its tokenizer. domains: with a loss of their own. fingerprint: what samples depend on."""

    config: Config
    world: World
    corpus: Corpus
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    fingerprint: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """Of the corpus's sources."""
        return source_identities(self.corpus, self.fingerprint)

    @classmethod
    def open(
        cls,
        config: Config,
        directory: RunDirectory,
        world: World,
        *,
        form: Form,
        open_text: Callable[[], Corpus] | None = None,
        on_phase: Callable[[str], object] = lambda phase: None,
        progress: Progress = lambda: None,
        on_wait: Progress = lambda: None,
    ) -> Inputs:
        """Open the inputs on all ranks: rank 0 lists the files and trains a missing tokenizer.

        open_text: opens the corpus on rank 0; default: that of the configuration, as a new run. on_phase: called on
        every rank with the name of each phase. progress: called during a phase. on_wait: called while a server is
        waited for, now and when the text is read, from any thread.
        Raises UserError for everything that the run would fail on later.
        """
        on_phase("corpus")
        opened = open_text or (lambda: split.open_text(config, form=form, on_wait=on_wait, progress=progress))
        corpus = distributed.on_main(world, lambda: opened().waiting(no_op))
        corpus = corpus.waiting(on_wait)  # a callback of each rank's own
        distributed.agree(world, lambda: require_here(corpus.files))
        if corpus.drop is not None:
            distributed.agree(world, corpus.drop.entries)
        on_phase("tokenizer")
        path = directory.tokenizer
        distributed.on_main(
            world, lambda: ensure_tokenizer(config, target=path, corpus=corpus, progress=progress) and None
        )
        on_phase("text")
        domains, data_fingerprint = distributed.on_main(world, lambda: _describe(corpus, config, Tokenizer.load(path)))
        tokenizer = distributed.agree(world, lambda: Tokenizer.load(path))
        return cls(config, world, corpus, tokenizer, tuple(domains), data_fingerprint)

    def loader(
        self, state: RunState, *, on_window: Callable[[int, SourceOrder], object] = lambda source, order: None
    ) -> Loader:
        """This rank's batches after `state`. on_window: as for the loader."""
        config, world = self.config, self.world
        return Loader(
            replace(self.corpus, start=state.start),
            self.tokenizer,
            packing=packing_of(config),
            seed=config.run.seed,
            batch=config.train.global_batch_size,
            micro_batch=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            consumed=state.consumed,
            skipped=state.skipped,
            order=state.order,
            exchange=distributed.gather if world.world_size > 1 else alone,
            threads=config.data.threads,
            domains=self.domains,
            document_mask=config.data.separates_documents,
            row_cache=self._ready_blocks(state),
            on_window=on_window,
        )

    def _ready_blocks(self, state: RunState) -> RowCache | None:
        folder = self.config.data.cache_dir
        if folder is None:
            return None
        keeping = BestEffort(
            f"data.cache_dir {folder}: not all blocks are kept", then="training continues without them"
        )
        return RowCache.of(folder, state.fingerprint, guard=keeping)


def check_other_files(config: Config, sources: Sequence[Source], form: Form, *, on_wait: Progress) -> None:
    """Raise UserError where validation text or initial weights cannot be read."""
    _require_validation(config, sources)
    for source in sources:
        require_documents(source, form=form, on_wait=on_wait)
    if config.model.weights is not None:
        check_initial_weights(Path(config.model.weights), config.model)


def _describe(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> tuple[list[str], dict[str, Any]]:
    require_a_batch(corpus, config, tokenizer)
    return corpus.domains(), fingerprint(corpus, config, tokenizer)


def _require_validation(config: Config, sources: Sequence[Source]) -> None:
    """Raise UserError where there is no validation text but `eval.every` is set."""
    if sources or config.eval.every is None:
        return
    problem = (
        f"card {config.data.corpus!r} has no validation text"
        if config.data.files is None
        else "data.files has no validation text"
    )
    why = " (data.held_out is 0)" if not config.data.held_out else " and no document that can be held out"
    raise UserError(
        f"eval.every is {config.eval.every}, but {problem}{why}; set data.eval_files to files that are not "
        "trained on, or --eval.every null"
    )


def validation(config: Config, corpus: Corpus) -> tuple[Source, ...]:
    """The validation text of a run, or what it holds out of its corpus. config: of the run; corpus: of any stage."""
    return load_card(config.data).validation or (() if corpus.held_out is None else corpus.card.validation)


def saved_validation(
    path: Path, files: Sequence[str] | None, *overrides: str, form_of: Callable[[Config], Form]
) -> tuple[Config, tuple[Source, ...]]:
    """The configuration of a checkpoint, and its validation text: `files`, its run's, or what that has held out.

    Raises UserError where there is none.
    """
    config = saved_config(path, *overrides, *([] if files is None else ["--data.eval_files", *files]))
    sources = load_card(config.data).validation
    if not sources and (path / manifest.STATE).is_file():
        run, fingerprint = path.absolute().parents[1], manifest.read_state(path).fingerprint
        held_out = held_out_source(run, fingerprint, form_of(config))
        sources = () if held_out is None else (held_out,)
    if not sources:
        raise UserError(f"{path}: its run has no validation text; give --files")
    return config, sources


def with_initial_weights(config: Config) -> Config:
    """The configuration with `model.weights` resolved, where it names a run or a checkpoint.

    The checkpoint's model dimensions replace those that are not set, and its tokenizer an unset `tokenizer.path`.
    Raises UserError where dimensions that are set differ.
    """
    if config.model.weights is None or not Path(config.model.weights).is_dir():
        return config
    path = find_checkpoint(Path(config.model.weights))
    saved = saved_config(path).model.dimensions
    given = {key: value for key, value in config.model.dimensions.items() if key in config.model.model_fields_set}
    differing = [
        f"{key} is {value}, in its checkpoint {saved[key]}" for key, value in given.items() if saved[key] != value
    ]
    if differing:
        raise UserError(f"model.weights {config.model.weights}: {'; '.join(differing)}; leave these model keys out")
    model = config.model.model_copy(update={**saved, "weights": str(path / WEIGHTS)})
    tokenizer = config.tokenizer.model_copy(update={"path": config.tokenizer.path or str(path / "tokenizer.model")})
    return config.model_copy(update={"model": model, "tokenizer": tokenizer})


def check_initial_weights(path: Path, model: ModelConfig) -> None:
    """Raise UserError where `path` is not a safetensors file with this model's weights."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights {path}: cannot be read ({error})") from error
    check_shapes(weight_shapes(model), shapes)
