"""Rows always full, every token once, and few documents cut."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamda.data import packing
from lamda.data.packing import PIECE, arrange, arrange_groups, first_fit

METHODS = ["concat", "best_fit"]


def cuts(pieces):
    """The number of cuts: pieces that do not begin their span."""
    return int(np.count_nonzero(pieces["offset"]))


def unavoidable_cuts(lengths, *, row_length):
    """The cuts of spans longer than a row, which no arrangement avoids."""
    return int(((np.asarray(lengths) - 1) // row_length).sum())


@st.composite
def blocks(draw):
    """Lengths that fill rows x row_length: tiny and equal ones, ones about as long as a row, ones far longer."""
    row_length, rows = draw(st.sampled_from([1, 2, 7, 12, 31])), draw(st.integers(1, 9))
    longest = draw(st.sampled_from([2, row_length, 3 * row_length + 1]))
    drawn = draw(st.lists(st.integers(1, longest), max_size=60))
    ends = np.unique(np.minimum(np.cumsum([*drawn, rows * row_length]), rows * row_length))
    return np.diff(ends, prepend=0), rows, row_length


def laid_out(pieces, rows, row_length):
    """Which (span, token) each place of each row gets, written token by token; twice is an error."""
    places = {}
    for row, start, length, span, offset in pieces.tolist():
        for n in range(length):
            assert (row, start + n) not in places
            places[row, start + n] = (span, offset + n)
    assert sorted(places) == [(row, start) for row in range(rows) for start in range(row_length)]
    return places


def log_normal(seed, *, rows, row_length, mean, sigma):
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, rows * row_length)
    ends = np.minimum(np.cumsum(np.maximum(lengths.astype(int), 1)), rows * row_length)
    return np.diff(np.unique(ends), prepend=0)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=80, deadline=None)
@given(block=blocks())
def test_every_row_is_full_and_every_token_is_in_it_once_and_in_order(method, block):
    lengths, rows, row_length = block
    pieces = arrange(method, lengths, rows=rows, row_length=row_length)
    places = laid_out(pieces, rows, row_length)
    tokens = [places[place] for place in sorted(places)]
    assert sorted(tokens) == [(span, token) for span, length in enumerate(lengths) for token in range(length)]
    for span in range(len(lengths)):
        assert [token for of, token in tokens if of == span] == list(range(lengths[span]))
    assert pieces["length"].min() >= 1
    assert np.array_equal(pieces, np.sort(pieces, order=("row", "start")))
    assert np.array_equal(pieces, arrange(method, lengths.copy(), rows=rows, row_length=row_length))


@settings(max_examples=80, deadline=None)
@given(block=blocks())
def test_concat_keeps_the_order_of_the_stream(block):
    lengths, rows, row_length = block
    places = laid_out(arrange("concat", lengths, rows=rows, row_length=row_length), rows, row_length)
    stream = [(span, token) for span, length in enumerate(lengths) for token in range(length)]
    assert [places[place] for place in sorted(places)] == stream


@settings(max_examples=150, deadline=None)
@given(block=blocks())
@example(
    block=(np.array([2, 3, 7, 3, 1, 8, 7, 3, 2, 2, 10]), 4, 12)
)  # longest first alone would cut what fits in order
def test_best_fit_never_cuts_more_than_concat(block):
    lengths, rows, row_length = block
    counted = {}
    for method in METHODS:
        pieces = arrange(method, lengths, rows=rows, row_length=row_length)
        counted[method] = sum(
            len({row for row, _, _, of, _ in pieces.tolist() if of == span}) - 1 for span in range(len(lengths))
        )
        assert cuts(pieces) == counted[method]  # a span is never twice in a row
    least = sum(-(-int(length) // row_length) - 1 for length in lengths)
    assert unavoidable_cuts(lengths, row_length=row_length) == least
    assert least <= counted["best_fit"] <= counted["concat"]


@pytest.mark.parametrize(
    ("lengths", "arranged"),
    [
        # The remainder of the long one and 7 fill a row, the three others the last.
        (
            [4, 13, 4, 7, 2],
            [(0, 0, 10, 1, 0), (1, 0, 3, 1, 10), (1, 3, 7, 3, 0), (2, 0, 4, 0, 0), (2, 4, 4, 2, 0), (2, 8, 2, 4, 0)],
        ),
        # No whole spans fill a row: as they come.
        ([6, 8, 6], [(0, 0, 6, 0, 0), (0, 6, 4, 1, 0), (1, 0, 4, 1, 4), (1, 4, 6, 2, 0)]),
        # Of equal ones the first goes first.
        ([9, 1, 1, 9], [(0, 0, 9, 0, 0), (0, 9, 1, 1, 0), (1, 0, 1, 2, 0), (1, 1, 9, 3, 0)]),
        ([9, 9, 1, 1], [(0, 0, 9, 0, 0), (0, 9, 1, 2, 0), (1, 0, 9, 1, 0), (1, 9, 1, 3, 0)]),
    ],
)  # fmt: skip
def test_the_arrangement_of_best_fit_never_changes(lengths, arranged):
    """Golden: may change together with `lamda.data.corpus.FORMAT` alone."""
    pieces = arrange("best_fit", np.array(lengths), rows=sum(lengths) // 10, row_length=10)
    assert [(row, start, length, span, offset) for row, start, length, span, offset in pieces.tolist()] == arranged
    assert pieces.dtype == PIECE


@pytest.mark.parametrize(
    ("row_length", "mean", "sigma", "share"),
    [(2049, 300, 1.0, 0.02), (2049, 300, 1.5, 0.02), (1025, 300, 1.0, 0.05), (1025, 1200, 1.5, 0.4)],
)
def test_best_fit_makes_few_of_the_cuts_that_can_be_avoided(row_length, mean, sigma, share):
    avoidable = dict.fromkeys(METHODS, 0)
    for seed in range(5):
        lengths = log_normal(seed, rows=64, row_length=row_length, mean=mean, sigma=sigma)
        for method in METHODS:
            pieces = arrange(method, lengths, rows=64, row_length=row_length)
            avoidable[method] += cuts(pieces) - unavoidable_cuts(lengths, row_length=row_length)
    assert avoidable["best_fit"] <= share * avoidable["concat"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[5, 4], [5, 6], [5, 0, 5]])
def test_spanes_that_cannot_fill_the_rows_are_refused(method, lengths):
    with pytest.raises(ValueError, match="cannot fill 2 rows of 5"):
        arrange(method, np.array(lengths), rows=2, row_length=5)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), row_length=st.sampled_from([1, 7, 12]))
def test_rows_in_groups_have_every_token_once_and_only_the_last_one_is_short(method, lengths, row_length):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "GROUP", 4)
        pieces = arrange_groups(method, np.array(lengths, np.int64), row_length=row_length)
    total = sum(lengths)
    places = {}
    for row, start, length, span, offset in pieces.tolist():
        for n in range(length):
            assert (row, start + n) not in places
            places[row, start + n] = (span, offset + n)
    assert sorted(places) == [divmod(place, row_length) for place in range(total)]
    stream = [(span, token) for span, length in enumerate(lengths) for token in range(length)]
    assert sorted(places.values()) == stream
    tokens = [places[place] for place in sorted(places)]
    assert tokens == stream or method == "best_fit"
    edge = 4 * row_length
    groups = [sorted(tokens[start : start + edge]) for start in range(0, total, edge)]
    assert [token for group in groups for token in group] == stream, "rows of different groups are mixed"


@given(st.lists(st.integers(0, 9), max_size=60))
def test_first_fit_cuts_nothing_and_leaves_no_row_that_another_would_have_held(lengths):
    rows = first_fit(lengths, row_length=9)
    filled = [0] * (max(rows, default=-1) + 1)
    for row, length in zip(rows, lengths, strict=True):
        filled[row] += length
    assert max(filled, default=0) <= 9
    assert all(one + other > 9 for n, one in enumerate(filled) for other in filled[:n] if one)


def test_a_span_that_fits_in_no_row_is_refused():
    with pytest.raises(ValueError, match="a span of 10 tokens fits in no row of 9"):
        first_fit([3, 10], row_length=9)
