"""The SentencePiece model as a Hugging Face fast tokenizer, with the same ids for every text but two kinds.

A plain text that spells a control symbol with U+2581, `<▁USER▁>`, becomes that symbol, and JOINER, `▁|▁`, is removed;
neither applies to a message in the chat template, nor to a text without U+2581.

Pieces have a real space in place of U+2581, so that U+2581 itself is an ordinary character and becomes its bytes. A
piece is merged from every pair of pieces that spells it, lower ids first, as in SentencePiece.

A chat template writes text and structure into one string. So control symbols have spellings with U+2581, `<▁USER▁>`,
and the template puts JOINER after each U+2581 of a message: text is never taken for a symbol. The normalizer removes
JOINER again, and the ids are those of the message.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.data.tokenizer import CONTROL_SYMBOLS, RESERVED_PIECES, SPACE_PIECE
from lamda.data.tokenizer import Tokenizer as SentencePieceTokenizer

SPELLINGS = tuple(f"<{SPACE_PIECE}{name}{SPACE_PIECE}>" for name in CONTROL_SYMBOLS)
"""Each control symbol's name in the fast tokenizer, by id."""
JOINER = f"{SPACE_PIECE}|{SPACE_PIECE}"
TEMPLATE = "chat_template.jinja"


def fast_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model file in this project's layout."""
    pieces = _pieces(model)
    core = Tokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=list(_merges(pieces)),
            byte_fallback=True,
            cache_capacity=0,
        )
    )
    core.normalizer = normalizers.Replace(JOINER, "")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(spelling, normalized=False, special=True) for spelling in SPELLINGS])
    end = SPELLINGS[0]
    core.post_processor = processors.TemplateProcessing(
        single=[end, "$A"], pair=[end, "$A", end, "$B"], special_tokens=[(end, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=end,
        eos_token=end,
        pad_token=SPELLINGS[1],
        additional_special_tokens=list(SPELLINGS[2:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=(resources.files(__package__) / TEMPLATE).read_text("utf-8"),
    )


def check_vocabulary(file: Path, model: ModelConfig) -> None:
    """Raises UserError if a model file of SentencePiece has not the vocabulary of this model."""
    pieces = SentencePieceTokenizer.load(file).vocab_size
    if pieces != model.vocab_size:
        raise UserError(f"{file}: has {pieces} pieces and the model {model.vocab_size} tokens: they do not match")


def save_tokenizer(model: Path, folder: Path) -> None:
    """Write the fast tokenizer's files into the folder, and the SentencePiece model that it is made from."""
    fast_tokenizer(model).save_pretrained(folder)
    shutil.copyfile(model, folder / "tokenizer.model")


def _pieces(model: Path) -> list[str]:
    """The spelling of every id."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    learned = [processor.id_to_piece(id) for id in range(len(RESERVED_PIECES), processor.get_piece_size())]
    return [*SPELLINGS, *RESERVED_PIECES[len(SPELLINGS) :], *(piece.replace(SPACE_PIECE, " ") for piece in learned)]


def _merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces by rank: those that make piece 400 before those that make piece 401.

    SentencePiece ranks all pairs of one piece equally and takes the leftmost. Here their ranks differ, without effect:
    if `an + a` and `a + na` could both make `ana`, the earlier of `an` and `na` has already taken the letters of the
    other.
    """
    learned = {*pieces[len(RESERVED_PIECES) :]}
    for piece in pieces[len(RESERVED_PIECES) :]:
        for cut in range(1, len(piece)):
            if piece[:cut] in learned and piece[cut:] in learned:
                yield piece[:cut], piece[cut:]
