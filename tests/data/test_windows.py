"""Windows are planned from their lanes' progress, spread over all lanes, and come back from a file as they were."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.data.blocks import LaneProgress
from lamda.data.lanes import Cursor
from lamda.data.windows import FIRST_TOKENS, ONE, Shape, SourceOrder, Window, places, spread

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=20)


def window_of(counts, *, number=0):
    cursors = (Cursor(),) * len(counts)
    return Window(number, 0, 0, 0, 0, ONE, cursors, tuple(counts), cursors)


def progress(counts, tokens=10):
    return [LaneProgress(count, tokens, Cursor(line=count)) for count in counts]


@given(st.integers(0, 3000), st.integers(0, 2**60), st.integers(0, 99))
def test_a_spread_holds_every_place_once(length, seed, window):
    assert np.array_equal(np.sort(spread(length, seed, window)), np.arange(length))


@pytest.mark.parametrize("seed", range(5))
def test_any_places_that_follow_each_other_are_spread_over_the_whole_range(seed):
    found = spread(4096, seed)
    for size in (8, 32, 256):
        for start in range(0, 4096 - size, 97):
            parts = np.bincount(found[start : start + size] * size // 4096, minlength=size)
            assert parts.max() <= 4  # random draws have 4 to 6
            assert np.count_nonzero(parts) >= size // 2


@given(COUNTS, st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 50), st.booleans())
def test_the_places_of_a_window_are_the_rows_of_its_lanes_each_once(counts, seed, source, number, in_order):
    lanes, rows = places(window_of(counts, number=number), seed=seed, source=source, in_order=in_order)
    expected = [(lane, row) for lane, count in enumerate(counts) for row in range(count)]
    found = list(zip(lanes.tolist(), rows.tolist(), strict=True))
    assert sorted(found) == expected
    assert found == expected or not in_order


def test_seeds_sources_and_windows_have_places_of_their_own():
    found = {
        tuple(zip(*map(np.ndarray.tolist, places(window_of([50] * 8, number=n), seed=s, source=o, in_order=False)),
                  strict=True))
        for n, s, o in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }  # fmt: skip
    assert len(found) == 4


def test_the_places_of_a_window_never_change():
    """Golden: may change together with `lamda.data.corpus.FORMAT` alone."""
    lanes, rows = places(window_of([3, 0, 4, 2]), seed=7, source=1, in_order=False)
    assert (lanes.tolist(), rows.tolist()) == GOLDEN_PLACES


GOLDEN_PLACES = ([2, 3, 0, 2, 0, 2, 3, 0, 2], [0, 0, 1, 1, 0, 3, 1, 2, 2])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=8),
    share=st.integers(1, 16384),
    length=st.sampled_from([1, 16, 128]),
    full=st.integers(1, 1 << 20),
    bytes_per_token=st.floats(0.5, 20),
)
def test_windows_grow_to_their_size_and_end_each_epoch_exactly(lengths, share, length, full, bytes_per_token):
    shape = Shape(share, tuple(lengths), length, full)
    sizes = [shape.tokens(number) for number in range(60)]
    assert sizes == sorted(sizes)
    assert min(sizes) >= length * len(lengths)
    order, until, epochs = SourceOrder(), 0, 0
    for number in range(40):
        plan = order.plan(shape)
        assert (plan.number, plan.epoch, plan.since) == (number, epochs, until)
        assert plan.since < plan.until <= ONE
        assert (plan.part(0, axis_length=lengths[0]).target is None) == (plan.until == ONE)
        assert all(start == Cursor() for start in plan.starts) or plan.since > 0
        tokens = int((plan.until - plan.since) / ONE * sum(lengths) / bytes_per_token / len(lengths))
        order = order.add(plan, progress([number + 1] * len(lengths), tokens), shape)
        until, epochs = (0, epochs + 1) if plan.until == ONE else (plan.until, epochs)
    window = order.windows[-1]
    assert window.base == order.end - window.rows == len(lengths) * sum(range(1, 40))


def test_windows_are_planned_by_the_bytes_a_token_of_the_first_ones():
    shape = Shape(16384, (1 << 30, 1 << 30), 1024, 1 << 24)
    order = SourceOrder()
    assert order.plan(shape).until == 4 * FIRST_TOKENS * ONE >> 31
    order = order.add(order.plan(shape), progress([128, 128], tokens=FIRST_TOKENS), shape)  # two bytes each
    plan = order.plan(shape)
    assert plan.until - plan.since == pytest.approx(2 * shape.tokens(1) / 2**31 * ONE, rel=1e-4)


def test_windows_follow_text_whose_tokens_become_shorter_or_longer():
    """Sorted text: a window is planned from the one before it, not from the first ones of the run."""
    shape, order = Shape(16384, (1 << 34,), 1024, 1 << 22), SourceOrder()
    for number, bytes_per_token in enumerate([16] * 40 + [2] * 20 + [8] * 20):
        plan = order.plan(shape)
        assert plan.until < ONE
        tokens = ((plan.until - plan.since) * (1 << 34) >> 32) // bytes_per_token
        if number % 20 > 6 and number > 20:
            assert tokens == pytest.approx(1 << 22, rel=0.05)
        order = order.add(plan, progress([tokens // 1024], tokens), shape).without(order.end)


def test_a_part_under_half_a_window_is_no_window_and_an_epoch_may_be_one():
    for windows, is_last in ((1, True), (1.49, True), (1.6, False)):
        shape = Shape(16384, (int(4 * FIRST_TOKENS * windows),), 16, 1)
        assert (SourceOrder().plan(shape).until == ONE) == is_last
    assert SourceOrder().plan(Shape(16384, (1 << 40,), 16, 1, is_epoch=True)).until == ONE


def test_only_windows_that_are_still_asked_for_are_kept_and_they_come_back_from_a_file():
    shape = Shape(16384, (1 << 24, 1 << 24), 16, 1 << 20)
    order = SourceOrder()
    for number in range(4):
        order = order.add(order.plan(shape), progress([5, number], 1 << 17), shape)
    ends = np.cumsum([5 + number for number in range(4)]).tolist()
    for row in range(order.end):
        kept = order.without(row)
        assert kept.at(row) == order.at(row)
        assert [window.number for window in kept.windows] == [n for n, end in enumerate(ends) if end > row]
        assert kept.plan(shape) == order.plan(shape)
    assert [window.number for window in order.without(order.end).windows] == [3]
    with pytest.raises(KeyError):
        order.without(6).at(0)
    assert SourceOrder.from_json(json.loads(json.dumps(asdict(order)))) == order
    assert all(cursor.digest is None for window in order.without_digests().windows for cursor in window.afters)


def test_the_epochs_that_are_over_grow_evenly_with_the_rows():
    shape = Shape(16384, (16 * FIRST_TOKENS,), 16, 1)
    order, last = SourceOrder(), -1.0
    for _ in range(9):
        order = order.add(order.plan(shape), progress([40], FIRST_TOKENS), shape)
    for row in range(1, order.end + 1):
        epoch = order.at(row - 1).epoch_at(row)
        assert epoch > last
        last = epoch
    ended = [window for window in order.windows if window.is_last]
    assert [window.epoch_at(window.base + window.rows) for window in ended] == [1.0, 2.0]
