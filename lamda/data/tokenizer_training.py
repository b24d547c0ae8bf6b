"""Learning a vocabulary: SentencePiece BPE with the layout that `lamda.data.tokenizer` states."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import sentencepiece

from lamda.config.errors import UserError
from lamda.console import computing, waiting
from lamda.data.tokenizer import (
    CONTROL_PIECES,
    RESERVED_PIECES,
    SPACE_PIECE,
    UNKNOWN_PIECE,
    WHITE_SPACE_PIECES,
)
from lamda.durable import replace_file

# No piece reaches across these: the symbols of their own, U+2581, and what SentencePiece's trainer keeps for
# itself (NUL and U+2585: it drops a sentence that holds the latter).
_BOUNDARIES = re.compile("[\n\t\r\0\u2581\u2585]+")
_SENTENCE_CHARACTERS = 1024  # at most 4096 bytes; SentencePiece skips sentences longer than 4192


def train_tokenizer(
    texts: Iterable[str], path: str | Path, *, vocab_size: int, progress: Callable[[], object] = lambda: None
) -> None:
    """Learn a vocabulary from all of `texts` and write it to `path`, complete or not at all.

    The same texts in the same order give the same file, byte for byte.

    Args:
        texts: documents without lone surrogates; they are read once, but SentencePiece keeps them in memory.
        path: where the model goes; its folder is made where it is not there.
        vocab_size: V, with the reserved symbols.
        progress: called while the library computes.

    Raises:
        UserError: there is no text, too little of it for so many pieces, or too few pieces for its characters.
    """
    if vocab_size <= len(RESERVED_PIECES):
        raise UserError(f"model.vocab_size: {vocab_size} is too small, {len(RESERVED_PIECES)} symbols are reserved")
    failures: list[BaseException] = []
    with ExitStack() as learning:
        learning.enter_context(computing(progress))
        sentences = _recording(_sentences(texts), failures)
        begin = partial(learning.enter_context, waiting(f"learning {vocab_size:,} pieces"))
        try:
            model = _learn(_then(sentences, begin), vocab_size=vocab_size)
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise _explained(error, vocab_size) from error
    keep_model(Path(path), model)


def keep_model(path: Path, model: bytes) -> None:
    """Write a model's file, whole or not at all. Raises UserError where the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, model)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room, or choose another run.dir"
        ) from error


def _learn(sentences: Iterator[str], *, vocab_size: int) -> bytes:
    """The model file. Raises RuntimeError with SentencePiece's words."""
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
    """Stretches between boundaries, long ones cut before spaces: short enough that none is skipped."""
    for text in texts:
        for stretch in _BOUNDARIES.split(text):
            start = 0
            while len(stretch) - start > _SENTENCE_CHARACTERS:
                space = stretch.rfind(" ", start + 1, start + _SENTENCE_CHARACTERS)
                end = space if space > 0 else start + _SENTENCE_CHARACTERS
                yield stretch[start:end]
                start = end
            if start < len(stretch):
                yield stretch[start:]


def _recording(sentences: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    """The same sentences; what goes wrong in reading them is kept, as SentencePiece makes a RuntimeError of it."""
    try:
        yield from sentences
    except GeneratorExit:
        raise
    except BaseException as error:  # Ctrl-C too
        failures.append(error)
        raise


def _then(sentences: Iterator[str], begin: Callable[[], object]) -> Iterator[str]:
    """The same sentences, and after the last of them the call: SentencePiece begins to learn then."""
    yield from sentences
    begin()


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """SentencePiece's complaint as a user's error where it is one."""
    message = str(error)
    if largest := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return UserError(
            f"model.vocab_size: the text is too little for a vocabulary of {vocab_size} pieces; set "
            f"model.vocab_size to at most {largest[1]}, or give more text with data.files"
        )
    if smallest := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"model.vocab_size: {vocab_size} pieces are fewer than the characters of the text need; set "
            f"model.vocab_size to at least {smallest[1]}"
        )
    if "!sentences_.empty()" in message:
        return UserError("data.files: there is no text to train a tokenizer on; give files that have some")
    return error
