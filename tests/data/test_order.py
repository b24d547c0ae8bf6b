"""The global order is a closed form, in proportion, and jumps over skipped windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamda.data.hashing import permutation, splitmix64
from lamda.data.order import SLOTS, Order, make_table, next_samples

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=13)


def test_splitmix64_gives_the_published_sequence():
    """Vigna's splitmix64.c from state 1234567: each output is the function of a state that grows by the step."""
    step = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * step) % 2**64 for n in range(5)], np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_permutations_are_the_same_on_every_machine_and_version():
    assert permutation(7, 0, 3, 5).tolist() == GOLDEN_PERMUTATION


GOLDEN_PERMUTATION = [4, 1, 0, 2, 6, 5, 3]


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 100))
def test_a_permutation_holds_every_row_once(length, seed, block):
    assert sorted(permutation(length, seed, block)) == list(range(length))


@given(WEIGHTS)
def test_every_lane_hands_out_its_rows_in_order_and_without_gaps(weights):
    order = Order((make_table([(1, weights)]),))
    lanes, rows = order.rows(np.arange(40_000))
    for lane in range(len(weights)):
        own = rows[lanes == lane]
        assert np.array_equal(own, np.arange(len(own)))


@given(WEIGHTS, st.integers(0, 200_000))
def test_rows_before_counts_what_rows_gives(weights, sample):
    order = Order((make_table([(1, weights)]),))
    lanes, _ = order.rows(np.arange(sample))
    assert np.array_equal(order.rows_before(sample), np.bincount(lanes, minlength=len(weights)))


@given(WEIGHTS)
def test_shares_are_exact_to_a_slot_and_spread_evenly(weights):
    table = make_table([(1, weights)])
    turn = len(table.slots)
    for lane, weight in enumerate(weights):
        places = np.flatnonzero(table.slots == lane)
        exact = weight / sum(weights) * turn
        assert abs(len(places) - exact) < 1 or len(places) == 1 or turn < SLOTS
        expected = (np.arange(len(places)) + 0.5) * turn / len(places)
        assert np.abs(places - expected).max() <= len(weights) + turn / len(places) * 0.5


def test_equal_lanes_take_plain_turns():
    assert make_table([(1, [2.5] * 3)]).slots.tolist() == [0, 1, 2]


@given(
    st.integers(0, 50),
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 9)), max_size=4),
)
def test_steps_take_every_sample_outside_the_skipped_windows_once(consumed, count, windows):
    skipped = [(start, start + length) for start, length in windows]
    allowed = [g for g in range(consumed, 400) if not any(a <= g < b for a, b in skipped)]
    first, after = next_samples(consumed, count, skipped)
    second, _ = next_samples(after, count, skipped)
    assert [*first, *second] == allowed[: 2 * count]


@pytest.mark.parametrize("weights", [[1, 2], [1, 1e-9, 3]])
def test_every_lane_has_a_slot(weights):
    assert set(make_table([(1, weights)]).slots.tolist()) == set(range(len(weights)))


@given(st.lists(WEIGHTS, min_size=2, max_size=3), st.integers(1, 30_000), st.integers(1, 30_000))
def test_weights_that_change_at_a_sample_lose_and_repeat_no_row(stages, first, second):
    lanes = min(map(len, stages))
    tables = tuple(make_table([(1, weights[:lanes])]) for weights in stages)
    starts = (0, first, first + second)[: len(tables)]
    order = Order(tables, starts)
    owner, rows = order.rows(np.arange(70_000))
    for lane in range(lanes):
        own = rows[owner == lane]
        assert np.array_equal(own, np.arange(len(own)))
    for sample in (first - 1, first, first + 1, 65_432):
        assert np.array_equal(order.rows_before(sample), np.bincount(owner[:sample], minlength=lanes))
    assert np.array_equal(owner[:first], Order(tables[:1]).rows(np.arange(first))[0])


def test_a_mixture_has_its_shares_exactly_in_every_round():
    """LaMDA's own shares are whole numbers of slots, however unequal the lanes of a source are."""
    shares = np.array([50, 12.5, 12.5, 12.5, 6.25, 6.25])
    sizes = [[3.0, 1.7, 9.1], [1.0] * 7, [5.5, 0.01], [2.0], [1.0, 1.1], [8.0, 3.0, 3.3]]
    table = make_table(list(zip(shares.tolist(), sizes, strict=True)))
    lanes, _ = Order((table,)).rows(np.arange(3 * SLOTS, 4 * SLOTS))
    source_of_lane = np.repeat(np.arange(6), [len(lanes) for lanes in sizes])
    assert np.array_equal(np.bincount(source_of_lane[lanes]), shares * SLOTS / 100)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=12))
def test_lanes_of_unequal_size_end_their_epochs_within_one_per_cent(sizes):
    order = Order((make_table([(1, sizes)]),))
    samples = 200 * SLOTS
    epochs = order.rows_before(samples) / (np.array(sizes) / sum(sizes) * samples)
    assert epochs.max() / epochs.min() < 1 + 0.01 + 2 * sum(sizes) / min(sizes) / SLOTS
