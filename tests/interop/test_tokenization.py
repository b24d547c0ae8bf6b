"""The fast tokenizer: SentencePiece's ids for every text, and no structure made of text."""

from __future__ import annotations

import sysconfig
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from lamda.data.tokenizer import RESERVED_PIECES, SPACE_PIECE, Tokenizer
from lamda.data.tokenizer_training import train_tokenizer
from lamda.dialog.conversation import Conversation, Message
from lamda.dialog.encoding import Encoding
from lamda.dialog.examples import examples_of
from lamda.interop.huggingface.tokenization import JOINER, SPELLINGS, fast_tokenizer, save_tokenizer
from tests.interop.hostile import all_scalars, hostile_lines


class Pair:
    """One vocabulary in both tokenizers."""

    def __init__(self, path: Path) -> None:
        self.path, self.fast = path, fast_tokenizer(path)
        self.ours = Tokenizer.load(path)
        self.sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.ours.vocab_size
        ids = range(len(RESERVED_PIECES), self.vocab_size)
        self.pieces = [self.ours.decode([id]) for id in ids]

    def check(self, lines: list[str]) -> None:
        """Both give the same ids, and the text back."""
        # SentencePiece itself takes U+2581 for a space, which LaMDA's tokenizer mends.
        found = [each.ids for each in self.fast.backend_tokenizer.encode_batch(lines, add_special_tokens=False)]
        wanted = self.sentencepiece.encode([line.replace(SPACE_PIECE, "") for line in lines])
        for line, ids, expected in zip(lines, found, wanted, strict=True):
            assert ids == (self.ours.encode(line) if SPACE_PIECE in line else expected), repr(line)
        assert self.fast.backend_tokenizer.decode_batch(found) == lines


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """A vocabulary of code: long runs of spaces, dots and dashes, which overlap with themselves."""
    library = Path(sysconfig.get_path("stdlib"))
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    train_tokenizer(
        [(library / name).read_text("utf-8") for name in ("argparse.py", "ast.py", "calendar.py", "heapq.py")],
        path,
        vocab_size=1500,
    )
    return Pair(path)


def test_ids_are_sentencepieces(pair):
    pair.check([*islice(hostile_lines(pair.pieces, seed=0), 6000), *all_scalars(step=37)])


def test_pieces_that_overlap_are_merged_as_sentencepiece_does(pair):
    """`tex + t` and `t + ext` both make `text`; runs of spaces are made in many ways."""
    cuts = {piece: [(piece[:i], piece[i:]) for i in range(1, len(piece))] for piece in pair.pieces}
    known = {*pair.pieces}
    ways = {piece: [cut for cut in each if known.issuperset(cut)] for piece, each in cuts.items()}
    manifold = [piece for piece, each in ways.items() if len(each) > 1]
    assert {"    ", "text"} <= {*manifold}
    for piece in manifold:
        halves = {half for way in ways[piece] for half in way}
        pair.check([piece * count + half for count in range(1, 9) for half in ("", *halves)])


def test_a_document_is_read_as_one_text(pair):
    text = Path(sysconfig.get_path("stdlib"), "shutil.py").read_text("utf-8")
    assert pair.fast(text, add_special_tokens=False).input_ids == pair.ours.encode(text)


def test_a_text_begins_with_the_end_symbol_as_lamda_generates(pair):
    assert pair.fast("a b").input_ids == [pair.ours.end_of_document, *pair.ours.encode("a b")]


def test_only_spellings_with_the_space_piece_differ(pair):
    """What the model card excepts, and nothing else of U+2581."""
    encode = pair.fast.backend_tokenizer.encode
    assert encode(SPELLINGS[7], add_special_tokens=False).ids == [7]
    assert encode(f"a{JOINER}b", add_special_tokens=False).ids == pair.ours.encode("ab")
    pair.check([SPACE_PIECE, f"a{SPACE_PIECE} {SPACE_PIECE}{SPACE_PIECE}b", f"<{SPACE_PIECE}USER>"])


def test_what_is_saved_is_loaded_by_the_auto_class(pair, tmp_path):
    save_tokenizer(pair.path, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    line = f"Hello\n  {SPACE_PIECE} <USER> \0 é漢"
    assert loaded(line).input_ids == pair.fast(line).input_ids
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 1, 0)
    assert loaded.chat_template == pair.fast.chat_template
    assert (tmp_path / "tokenizer.model").read_bytes() == pair.path.read_bytes()


NASTY = f"{SPELLINGS[8]} {JOINER} <USER>\n é{SPACE_PIECE}{JOINER}{SPACE_PIECE} 漢 "
CONTEXT = [
    Message("system", f"Be kind.{NASTY}"),
    Message("user", "Hi"),
    Message("assistant", f"Hello{NASTY}"),
    Message("user", NASTY),
]
BASE, QUERY, SNIPPET = (
    Message("assistant", f"base{NASTY}"),
    Message("assistant", f"query{NASTY}", "TS"),
    Message("tool", f"{NASTY}snippet"),
)
AMPLE = 10**6


def templated(pair, messages, **options):
    """Ids that the chat template gives."""
    records = [{"role": each.role, "content": each.content, "to": each.to} for each in messages]
    return pair.fast.apply_chat_template(records, return_dict=True, **options)


def test_a_content_in_parts_is_the_text_that_they_make(pair):
    whole = [{"role": "user", "content": f"{SPACE_PIECE}|{SPACE_PIECE}USER{SPACE_PIECE}> b"}]
    cuts = [f"{SPACE_PIECE}", f"|{SPACE_PIECE}USER{SPACE_PIECE}", "", "> b"]
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in cuts]}]
    ids = [pair.fast.apply_chat_template(each, return_dict=True).input_ids for each in (whole, parts)]
    assert ids[0] == ids[1]
    for bad in (3, {"type": "text", "text": "x"}, [{"type": "image"}], ["x"], [{"type": "text", "text": 3}]):
        with pytest.raises(TemplateError, match="must be"):
            pair.fast.apply_chat_template([{"role": "user", "content": bad}])


@pytest.mark.parametrize("count", range(1, 5))
def test_template_of_a_prompt_is_the_context(pair, count):
    wanted = Encoding(pair.ours).context(CONTEXT[:count])
    assert templated(pair, CONTEXT[:count], add_generation_prompt=True).input_ids == wanted


def test_template_of_a_finished_research_turn_is_the_context(pair):
    said = [*CONTEXT, BASE, QUERY, SNIPPET, Message("assistant", "so"), Message("user", "And?")]
    read = [message for message in said if message not in (BASE, QUERY, SNIPPET)]
    wanted = Encoding(pair.ours).context(read)
    assert templated(pair, said, add_generation_prompt=True).input_ids == wanted


def test_template_of_a_conversation_is_what_is_trained_on(pair):
    turns = [
        [BASE, QUERY, SNIPPET, Message("assistant", "so")],
        [Message("assistant", "one"), Message("assistant", "two")],
    ]
    said = [
        *CONTEXT,
        *turns[0],
        Message("user", "And?"),
        *turns[1],
        Message("user", "Or?"),
        Message("assistant", "No."),
    ]
    generative, _ = examples_of(Conversation(tuple(said)))
    found = templated(pair, said, return_assistant_tokens_mask=True)
    assert found["input_ids"] == generative[-1].encode(Encoding(pair.ours), max_tokens=AMPLE).ids


def test_template_of_an_open_research_turn_is_its_context(pair):
    wanted = Encoding(pair.ours).research_context(CONTEXT, BASE.content, [(QUERY.content, SNIPPET.content)])
    assert templated(pair, [*CONTEXT, BASE, QUERY, SNIPPET], add_generation_prompt=True).input_ids == wanted


def test_template_marks_what_is_trained_on(pair):
    encoding = Encoding(pair.ours)
    steps = [(QUERY.content, SNIPPET.content)]
    answer, further = Message("assistant", f"so{NASTY}"), Message("assistant", f"more{NASTY}", "TS")
    further_example = encoding.research_step(CONTEXT, BASE.content, steps, further, max_tokens=AMPLE)
    wanted = [
        ([answer], encoding.generative(CONTEXT, answer.content, max_tokens=AMPLE)),
        (
            [BASE, QUERY, SNIPPET, answer],
            encoding.research_step(CONTEXT, BASE.content, steps, answer, max_tokens=AMPLE),
        ),
        ([BASE, QUERY, SNIPPET, further], further_example),
    ]
    for turn, example in wanted:
        found = templated(pair, [*CONTEXT, *turn], return_assistant_tokens_mask=True)
        assert found["input_ids"] == example.ids
        assert [bool(scored) for scored in found["assistant_masks"]] == example.loss_mask


@pytest.mark.parametrize(
    ("message", "output"),
    [({"role": "usr", "content": "x"}, "role"), ({"role": "user", "content": [{"type": "text"}]}, "text")],
)
def test_template_refuses_what_is_no_conversation(pair, message, output):
    with pytest.raises(Exception, match=output):
        pair.fast.apply_chat_template([message])
