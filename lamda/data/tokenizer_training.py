"""Training a tokenizer: SentencePiece BPE with the layout of `lamda.data.tokenizer`, on the text of a run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import sentencepiece

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.console import Progress, computing, waiting
from lamda.data.corpus import Corpus
from lamda.data.split import open_text
from lamda.data.tokenizer import (
    CONTROL_PIECES,
    RESERVED_PIECES,
    SPACE_PIECE,
    UNKNOWN_PIECE,
    WHITE_SPACE_PIECES,
    Tokenizer,
)
from lamda.durable import replace_file

# No piece crosses these: white space with its own ids, U+2581, and the characters that SentencePiece reserves
# (NUL and U+2585: it drops sentences that contain the latter).
_BOUNDARIES = re.compile("[\n\t\r\0\u2581\u2585]+")
_SENTENCE_CHARACTERS = 1024  # at most 4096 bytes; SentencePiece skips sentences longer than 4192


def ensure_tokenizer(
    config: Config, *, target: Path, corpus: Corpus, progress: Callable[[], object] = lambda: None
) -> Tokenizer:
    """The tokenizer of a run, at `target`: copied from tokenizer.path, or trained on the corpus if neither exists.

    progress: called while text is read and pieces are learned. Raises UserError if its size is not model.vocab_size, or
    if `target` is another tokenizer.
    """
    if config.tokenizer.path is not None:
        given = _checked(Tokenizer.load(config.tokenizer.path), config, Path(config.tokenizer.path))
        if target.exists() and Tokenizer.load(target).sha256 != given.sha256:
            raise UserError(
                f"tokenizer.path {config.tokenizer.path} is not the tokenizer of this run ({target}); remove it, or "
                "use another run.dir"
            )
        if not target.exists():
            keep_model(target, Path(config.tokenizer.path).read_bytes())
        return given
    if not target.exists():
        sample = _sample(corpus, limit=config.tokenizer.train_bytes, progress=progress)
        train_tokenizer(sample, target, vocab_size=config.model.vocab_size, progress=progress)
    return _checked(Tokenizer.load(target), config, target)


def train_run_tokenizer(config: Config) -> Path:
    """`lamda tokenizer train`: train the tokenizer of a run before the run. Returns its path."""
    target = Path(config.tokenizer.path or Path(config.run.dir) / "tokenizer.model")
    if target.exists():
        raise UserError(f"{target} exists already; remove it, or use another tokenizer.path")
    corpus = open_text(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be created ({error.strerror}); use another run.dir") from error
    train_tokenizer(_sample(corpus, limit=config.tokenizer.train_bytes), target, vocab_size=config.model.vocab_size)
    return target


def _sample(corpus: Corpus, *, limit: int, progress: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Documents from all lanes in turn, up to `limit` bytes."""
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


def train_tokenizer(
    texts: Iterable[str], path: str | Path, *, vocab_size: int, progress: Callable[[], object] = lambda: None
) -> None:
    """Train a tokenizer on `texts` (without lone surrogates) and write it to `path` atomically, with its folder.

    The same texts in the same order give the same file, byte for byte. They are read once; SentencePiece keeps them in
    memory. vocab_size: V, with the reserved symbols. progress: called while SentencePiece computes. Raises UserError if
    there is no text, too little text for so many pieces, or too few pieces for its characters.
    """
    if vocab_size <= len(RESERVED_PIECES):
        raise UserError(f"model.vocab_size: {vocab_size} is too small, {len(RESERVED_PIECES)} symbols are reserved")
    failures: list[BaseException] = []
    with ExitStack() as learning:
        learning.enter_context(computing(progress))
        begin = partial(learning.enter_context, waiting(f"learning {vocab_size:,} pieces"))
        try:
            model = _learn(_watched(_sentences(texts), failures, begin), vocab_size=vocab_size)
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise _explained(error, vocab_size) from error
    keep_model(Path(path), model)


def keep_model(path: Path, model: bytes) -> None:
    """Write a model file atomically. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, model)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or use another run.dir"
        ) from error


def _learn(sentences: Iterator[str], *, vocab_size: int) -> bytes:
    """The bytes of a model file. Raises RuntimeError from SentencePiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentencepiece_length=16,
        byte_fallback=True,
        character_coverage=0.9999,
        required_chars=SPACE_PIECE,
        eos_id=0,
        eos_piece=CONTROL_PIECES[0],
        pad_id=1,
        pad_piece=CONTROL_PIECES[1],
        control_symbols=list(CONTROL_PIECES[2:]),
        unk_id=len(CONTROL_PIECES),
        unk_piece=UNKNOWN_PIECE,
        bos_id=-1,
        user_defined_symbols=list(WHITE_SPACE_PIECES),
        input_sentence_size=0,  # its sampling differs from process to process
        num_threads=4,  # a constant: it is written into the model
        minloglevel=2,
    )
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Segments between boundaries, cut before spaces so that none is too long for SentencePiece."""
    for text in texts:
        for segment in _BOUNDARIES.split(text):
            start = 0
            while len(segment) - start > _SENTENCE_CHARACTERS:
                space = segment.rfind(" ", start + 1, start + _SENTENCE_CHARACTERS)
                end = space if space > 0 else start + _SENTENCE_CHARACTERS
                yield segment[start:end]
                start = end
            if start < len(segment):
                yield segment[start:]


def _watched(sentences: Iterator[str], failures: list[BaseException], begin: Callable[[], object]) -> Iterator[str]:
    """The same sentences. Exceptions from reading are kept, since SentencePiece replaces them with RuntimeError.

    begin: called after the last sentence, when SentencePiece starts to learn.
    """
    try:
        yield from sentences
    except GeneratorExit:
        raise
    except BaseException as error:  # Ctrl-C too
        failures.append(error)
        raise
    begin()


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """The UserError for a SentencePiece error that the user can fix; otherwise the error itself."""
    message = str(error)
    if largest := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return UserError(
            f"model.vocab_size: there is too little text for a vocabulary of {vocab_size} pieces; set "
            f"model.vocab_size to at most {largest[1]}, or give more text with data.files"
        )
    if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"model.vocab_size: {vocab_size} pieces are too few for the characters of the text; set "
            f"model.vocab_size to at least {smallest[1]}"
        )
    if "!sentences_.empty()" in message:
        return UserError(
            "data.files: there is no text to train a tokenizer on, outside data.drop; give files with text"
        )
    return error
