"""A tokenizer for a run, trained on the run's own text where none is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.console import Progress
from lamda.data.corpus import Corpus, open_corpus
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import keep_model, train_tokenizer


def ensure_tokenizer(
    config: Config, *, target: Path, corpus: Corpus, progress: Callable[[], object] = lambda: None
) -> Tokenizer:
    """The run's tokenizer, brought to `target`: copied from tokenizer.path, or trained where neither exists.

    progress: called as text is read and learned from.
    Raises UserError where its size is not the model's, or where `target` holds another one.
    """
    if config.tokenizer.path is not None:
        given = _checked(Tokenizer.load(config.tokenizer.path), config, Path(config.tokenizer.path))
        if target.exists() and Tokenizer.load(target).sha256 != given.sha256:
            raise UserError(
                f"tokenizer.path {config.tokenizer.path} is not the tokenizer of this run ({target}); take it out, or "
                "choose another run.dir"
            )
        if not target.exists():
            keep_model(target, Path(config.tokenizer.path).read_bytes())
        return given
    if not target.exists():
        sample = _sample(corpus, limit=config.tokenizer.train_bytes, progress=progress)
        train_tokenizer(sample, target, vocab_size=config.model.vocab_size, progress=progress)
    return _checked(Tokenizer.load(target), config, target)


def train_run_tokenizer(config: Config) -> Path:
    """What `lamda tokenizer train` does: train the run's tokenizer ahead of the run. Returns its path."""
    target = Path(config.tokenizer.path or Path(config.run.dir) / "tokenizer.model")
    if target.exists():
        raise UserError(f"{target} is there already; remove it, or name another tokenizer.path")
    corpus = open_corpus(config.data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be made ({error.strerror}); choose another run.dir") from error
    train_tokenizer(
        _sample(corpus, limit=config.tokenizer.train_bytes),
        target,
        vocab_size=config.model.vocab_size,
    )
    return target


def _sample(corpus: Corpus, *, limit: int, progress: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Documents from all lanes in turn, until `limit` bytes of them."""
    left = limit
    with Progress("reading text for the tokenizer", total=limit, unit="bytes") as shown:
        for document in corpus.documents_once():
            progress()
            yield document.text
            size = len(document.text.encode())
            shown.advance(min(size, left))
            left -= size
            if left <= 0:
                return


def _checked(tokenizer: Tokenizer, config: Config, path: Path) -> Tokenizer:
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} pieces, but model.vocab_size is {config.model.vocab_size}; set it to "
            f"{tokenizer.vocab_size}, or use another tokenizer"
        )
    return tokenizer
