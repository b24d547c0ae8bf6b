"""Words, signatures, strings like personal data: against other ways to find them, and on hostile text."""

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamda.audit import words as module
from lamda.audit.duplicates import exact_groups
from lamda.audit.pii import found_in, hidden
from lamda.audit.scan import signatures_of
from lamda.audit.words import ngrams, words

TEXTS = st.lists(st.text(st.sampled_from("aAbZ09 .\n-_éß中国のx"), max_size=60), min_size=1, max_size=8)


def words_of(text):
    """The same by a regular expression."""
    folded = re.sub("[A-Z]", lambda match: match[0].lower(), text)
    return re.findall(r"[\u3000-\u9fff]|(?:[a-z0-9]|[^\x00-\x7f\u3000-\u9fff])+", folded)


@given(TEXTS, st.integers(1, 4))
def test_ngrams_are_equal_where_their_words_are_and_stay_in_their_document(texts, size):
    hashes, offsets = words([text.encode() for text in texts])
    expected = [words_of(text) for text in texts]
    assert np.diff(offsets).tolist() == list(map(len, expected))
    found, begins = ngrams(hashes, offsets, size)
    grams = [tuple(each[n : n + size]) for each in expected for n in range(len(each) - size + 1)]
    assert np.diff(begins).tolist() == [max(0, len(each) - size + 1) for each in expected]
    names = {}
    assert all(names.setdefault(gram, key) == key for gram, key in zip(grams, found.tolist(), strict=True))
    assert len(set(names.values())) == len(names)


def test_words_do_not_depend_on_the_documents_beside_or_on_where_a_long_one_is_cut(monkeypatch):
    texts = [("word%d " % n) * (n * 40) for n in range(1, 9)]  # noqa: UP031
    whole = [words([text.encode()])[0] for text in texts]
    monkeypatch.setattr(module, "PIECE", 1000)
    hashes, offsets = words([text.encode() for text in texts])
    assert all(np.array_equal(part, one) for part, one in zip(np.split(hashes, offsets[1:-1]), whole, strict=True))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_signatures_estimate_the_similarity_of_sets(share):
    draw = np.random.default_rng(0)
    errors = []
    for _ in range(20):
        words_ = draw.integers(0, 1 << 30, 600)
        other = words_.copy()
        changed = round(600 * (1 - share) / (5 * (1 + share)))  # each changes five n-grams
        other[np.linspace(5, 590, changed).astype(int)] += 1 << 31
        texts = [" ".join(map(str, each)).encode() for each in (words_, other)]
        hashes, offsets = words(texts)
        grams, begins = ngrams(hashes, offsets, 5)
        one, two = (set(each.tolist()) for each in np.split(grams, begins[1:-1]))
        (first, second), is_signed = signatures_of(hashes, offsets)
        assert is_signed.all()
        errors.append((first == second).mean() - len(one & two) / len(one | two))
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.07


@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_first_of_equal_hashes_stands_for_all(hashes):
    assert exact_groups(np.array(hashes, np.uint64)).tolist() == [hashes.index(each) for each in hashes]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("email address", "to a.b+c@mail.example.org, or x@y.", ["a.b+c@mail.example.org"]),
        ("email address", "@decorator a@b user@localhost", []),
        ("IPv4 address", "10.2.3.4 and 10.2.3.4, 256.1.1.1, 1.2.3.4.5, v1.2.3.4", ["10.2.3.4"]),
        ("phone-like number", "(030) 555-0199; 212-555-0100; +49 30 1234 5678", None),
        ("phone-like number", "1234567890, 2024-01-02, 3.14159", []),
        ("card number", "4111 1111 1111 1111, 378282246310005, 4111 1111 1111 1112", None),
        ("card number", "0000 0000 0000 0000 1111111111111111", []),
        ("IBAN", "DE89 3704 0044 0532 0130 00 GB82WEST12345698765432 DE88 3704 0044 0532 0130 00", None),
        ("key or secret", "AKIAIOSFODNN7EXAMPLE -----BEGIN RSA PRIVATE KEY-----", None),
        ("key or secret", "AKIA ghp_short sk-", []),
    ],
)
def test_strings_like_personal_data_are_found_by_form_and_checksum(kind, text, expected):
    found = found_in(text, text.encode()).get(kind, [])
    assert found == expected if expected is not None else len(found) == {"phone-like number": 3}.get(kind, 2)


def test_what_is_shown_holds_no_such_string():
    text = "Mail a.person@example.org or call 212-555-0100, card 4111 1111 1111 1111 and half a.person@exam"
    shown = hidden(text, is_whole=False)
    assert shown.startswith("Mail a.… (20 characters) or call")
    assert not any(part in shown for part in ("person", "555", "1111"))
    assert hidden("x y", is_whole=True) == "x y"


@pytest.mark.parametrize("unit", ["a", "1", "@", "a@", "1 ", "1.", "AB12", "+", "(1", "a.", "\x00", "中"])
def test_a_long_line_takes_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    began = time.process_time()
    found_in(text, text.encode())
    words([text.encode()])
    assert time.process_time() - began < 2.0
