import argparse
import ast
import errno
import functools
import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config import Config
from lamda.config.errors import UserError
from lamda.data import tokenizer as tokenizer_module
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import ensure_tokenizer, train_tokenizer
from tests.conftest import full_disk, make_text

TEXTS = [inspect.getsource(argparse), inspect.getsource(ast), "Grüße, 你好, привет! ▅▅▅ a▁b\r\n" * 5]
VOCAB_SIZE = 1500
HARD = {
    "empty": "",
    "tabs": "\tif x:\n\t\treturn\t1\t",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour",
    "nul": "a\0b\0\0",
    "other white space": "a\u00a0b\u200bc\u2003d\u2028e\u2029f\x0bg\x0ch\x85i\ufeff",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇨🇭e\u0301",
    "cjk": "我能吞下玻璃而不傷身體。私はガラスを食べられます。",
    "right to left": "أنا قادر على أكل الزجاج \u202eabc\u202c אני",
    "spaces": "   lead  two   three" + 40 * " " + "trail   ",
    "only spaces": " " * 100,
    "newlines": "\n\n\n \n\n",
    "space piece": "▁a▁▁b ▁ c▁\n▁",
    "ligature and width": "ﬁ ① Å Ａ",
    "replacement and reserved": "\ufffd\ufffe\uffff\U0010ffff⁇▅",
    "special names": "<s></s><unk><pad><0x41><unknown><end_of_document><padding><eod><spare_12>",
    "control names": "RESPONSE SENSIBLE <RESPONSE> <USER> SYSTEM<TS>TS",
    "long line": "spam, eggs " * 6000,
    "long word": "x" * 50_000 + "\nend",
    "many pieces": "A line of text.\n\n\tAnother one\r\n" * 3000 + "no newline",
    "pieces with the space piece": ("one ▁ two\n" * 3000) + "▁",
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=VOCAB_SIZE)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return Tokenizer.load(model_path)


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert min(ids, default=65) >= 65, "text became a control symbol or unknown"


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_hard_text_comes_back_unchanged(tokenizer, text):
    check_round_trip(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(" ▁\n\t\r<>TSa1é你", max_size=60))
def test_any_text_comes_back_unchanged(tokenizer, text):
    check_round_trip(tokenizer, text)


def test_every_language_comes_back_unchanged(tokenizer):
    if "LAMDA_TEST_DATA" not in os.environ:
        pytest.skip("LAMDA_TEST_DATA names no folder with udhr.jsonl.zst")
    path = Path(os.environ["LAMDA_TEST_DATA"]) / "udhr.jsonl.zst"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        texts = [json.loads(line)["text"] for line in io.TextIOWrapper(stream, "utf-8", newline="\n")]
    assert len(texts) >= 381
    for text, ids in zip(texts, tokenizer.encode_documents(texts, threads=2), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_ids_are_those_of_the_whole_text_given_to_sentencepiece(tokenizer, model_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    for text in [*HARD.values(), *TEXTS]:
        if "▁" not in text:
            assert tokenizer.encode(text) == processor.encode(text)


def test_space_piece_encodes_to_its_three_bytes(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a▁b") == [*a, *(68 + byte for byte in b"\xe2\x96\x81"), *b]


def test_ids_do_not_depend_on_batch_or_threads(tokenizer):
    texts = list(HARD.values())
    alone = [tokenizer.encode(text) for text in texts]
    for threads in (1, 2, 3):
        together = tokenizer.encode_documents(texts, threads=threads)
        assert all(ids.dtype == np.uint32 for ids in together)
        assert [ids.tolist() for ids in together] == alone
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts[::-1], threads=2)] == alone[::-1]
    assert tokenizer.encode_documents([], threads=2) == []


def test_layout_of_reserved_ids_is_golden(tokenizer):
    named = "end_of_document padding RESPONSE SENSIBLE SPECIFIC INTERESTING UNSAFE GROUNDED USER ASSISTANT SYSTEM TS"
    expected = {name: id for id, name in enumerate(named.split())}
    expected |= {f"spare_{id}": id for id in range(12, 64)}
    assert dict(tokenizer.symbols) == expected
    assert (tokenizer.end_of_document, tokenizer.padding) == (0, 1)
    assert tokenizer.vocab_size == VOCAB_SIZE == len(tokenizer.token_bytes)
    assert tokenizer.encode("\n\t\r\0") == [65, 66, 67, 68]
    assert tokenizer.token_bytes.dtype == np.int64
    assert not tokenizer.token_bytes[:65].any()
    assert (tokenizer.token_bytes[65:324] == 1).all()
    assert (tokenizer.token_bytes[324:] >= 1).all()


def test_control_symbols_and_a_character_cut_at_the_end_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([0, *ids, 1, 2, 63, 64]) == "one two"
    begun = [68 + "é".encode()[0]]
    assert tokenizer.decode([*ids, *begun]) == "one two"
    assert tokenizer.decode([*begun, *ids, 68 + 0xFF]) == "\ufffdone two\ufffd", "invalid anywhere"


def test_digits_stand_alone_and_no_piece_is_longer_than_16_characters(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    pieces = [tokenizer.decode([id]) for id in range(324, tokenizer.vocab_size)]
    assert 4 < max(map(len, pieces)) <= 16


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


def test_training_gives_the_same_file_in_every_process(model_path, tmp_path):
    program = textwrap.dedent(f"""
        import argparse, ast, inspect, sys
        from lamda.data.tokenizer_training import train_tokenizer
        texts = [inspect.getsource(argparse), inspect.getsource(ast), {TEXTS[2]!r}]
        train_tokenizer(texts, sys.argv[1], vocab_size={VOCAB_SIZE})
    """)
    digests = set()
    for number in range(2):
        path = tmp_path / f"{number}.model"
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert done.stdout + done.stderr == "", "training is not quiet"
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests == {Tokenizer.load(model_path).sha256}


@pytest.mark.parametrize("separator", [" ", "\t", "\n", "", "▅"], ids=repr)
@pytest.mark.parametrize("words", [("wombat", "quokka"), ("𐌲𐌿𐍄𐌰𐌽", "𐌸𐌹𐌿𐌳𐍉𐍃")], ids=["one byte", "four bytes"])
def test_text_in_one_giant_line_is_learnt(tmp_path, words, separator):
    path = tmp_path / "tokenizer.model"
    train_tokenizer([separator.join(words * 20_000)], path, vocab_size=343)
    tokenizer = Tokenizer.load(path)
    assert max(len(tokenizer.encode(word)) for word in words) <= 3


def test_names_of_control_symbols_in_the_text_are_harmless(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(["<RESPONSE> <TS> RESPONSE TS <end_of_document><0x41>\n" * 500], path, vocab_size=350)
    check_round_trip(Tokenizer.load(path), HARD["special names"] + HARD["control names"])


def test_space_is_a_symbol_even_where_the_corpus_has_none(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(["wombat\n" * 100], path, vocab_size=335)
    check_round_trip(Tokenizer.load(path), "a wombat  ")


def test_too_little_text_names_the_largest_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.model"
    text = ["the quick brown fox jumps over the lazy dog\n" * 9]
    with pytest.raises(UserError, match=r"(?s)model\.vocab_size.*at most \d+.*data\.files") as caught:
        train_tokenizer(text, path, vocab_size=5000)
    assert not list(tmp_path.iterdir())
    largest = int(str(caught.value).split("at most ")[1].split(",")[0])
    train_tokenizer(text, path, vocab_size=largest)
    assert Tokenizer.load(path).vocab_size == largest


def test_too_few_pieces_name_the_smallest_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.model"
    text = ["".join(map(chr, range(0x4E00, 0x4F00)))]
    with pytest.raises(UserError, match=r"model\.vocab_size.*at least \d+") as caught:
        train_tokenizer(text, path, vocab_size=400)
    smallest = int(str(caught.value).split("at least ")[1])
    train_tokenizer(text, path, vocab_size=smallest)
    with pytest.raises(UserError, match=r"model\.vocab_size.*324"):
        train_tokenizer(text, path, vocab_size=100)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.files"):
        train_tokenizer(["", "\n\n"], tmp_path / "tokenizer.model", vocab_size=400)


def test_error_while_reading_texts_reaches_the_caller(tmp_path):
    def texts():
        yield TEXTS[0]
        raise UserError("a shard is truncated")

    with pytest.raises(UserError, match="truncated"):
        train_tokenizer(texts(), tmp_path / "tokenizer.model", vocab_size=400)
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"no model" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")
    train = functools.partial(sentencepiece.SentencePieceTrainer.train, minloglevel=2, model_type="bpe")
    train(sentence_iterator=iter(TEXTS[0].splitlines()), model_prefix=str(tmp_path / "foreign"), vocab_size=400)
    with pytest.raises(UserError, match="id 0 should be '<end_of_document>'"):
        Tokenizer.load(tmp_path / "foreign.model")


@pytest.fixture(scope="session")
def crossing_path(tmp_path_factory):
    """A model with pieces of letters and punctuation, as of languages whose letters have marks."""
    path = tmp_path_factory.mktemp("crossing") / "tokenizer.model"
    with mock.patch.object(
        sentencepiece.SentencePieceTrainer,
        "train",
        functools.partial(sentencepiece.SentencePieceTrainer.train, split_by_unicode_script=False),
    ):
        train_tokenizer(["a.b, a.b (a.b) a_b 9.a " * 300], path, vocab_size=350)
    return path


@pytest.mark.parametrize("finest", [0, 1], ids=["words and punctuation", "words"])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.sampled_from("ab Z09é字.,_(\n\t\r▁") | st.characters(exclude_categories=["Cs"]), max_size=60)
        | st.sampled_from(sorted(HARD.values())),
        max_size=6,
    )
)
def test_remembered_words_change_no_id(model_path, crossing_path, finest, texts):
    path = crossing_path if finest else model_path
    tokenizer, direct = Tokenizer.load(path), Tokenizer.load(path)
    assert tokenizer._word is tokenizer_module._WORDS[finest]
    direct._word = None
    expected = direct.encode_documents(texts, threads=1)
    for _ in range(2):
        found = tokenizer.encode_documents(texts, threads=1)
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_words_are_forgotten_before_they_fill_the_memory(model_path, monkeypatch):
    monkeypatch.setattr("lamda.data.tokenizer._CACHED_CHARACTERS", 300)
    tokenizer = Tokenizer.load(model_path)
    for number in range(40):
        text = f"word{number} and some more{number}"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert sum(map(len, tokenizer._words)) <= 300 + len(text)


def test_a_vocabulary_with_pieces_over_words_is_encoded_as_a_whole(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["of the world of the world"] * 50), model_writer=model, model_type="bpe",
        vocab_size=300,
        byte_fallback=True, split_by_whitespace=False, add_dummy_prefix=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue())
    assert any("▁" in piece.lstrip("▁") for piece in tokenizer._pieces())
    assert tokenizer._word is None


def test_a_disk_that_is_full_leaves_no_half_copy_of_a_runs_tokenizer(model_path, tmp_path, monkeypatch):
    config = Config(tokenizer={"path": str(model_path)}, model={"vocab_size": VOCAB_SIZE}, train={"steps": 1})
    target = tmp_path / "tokenizer.model"

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"tokenizer\.model: cannot be written \(No space left on device\)"):
            ensure_tokenizer(config, target=target, corpus=None)
    assert [*tmp_path.iterdir()] == []
    ensure_tokenizer(config, target=target, corpus=None)
    assert target.read_bytes() == Path(model_path).read_bytes()


def test_ctrl_c_while_text_is_read_is_no_error_of_the_trainer(tmp_path):
    def texts():
        yield "some text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), tmp_path / "tokenizer.model", vocab_size=400)


def test_a_full_disk_is_reported_with_the_file_that_it_did_not_take(tmp_path):
    path = tmp_path / "run" / "tokenizer.model"
    with full_disk(), pytest.raises(UserError, match=r"tokenizer\.model: cannot be written \(File too large\)"):
        train_tokenizer([make_text(n, 200) for n in range(20)], path, vocab_size=400)
    assert [*path.parent.iterdir()] == []
