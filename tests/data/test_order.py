"""The mixture is a closed form, in proportion at every sample, and jumps over skipped windows."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.data.hashing import permutation, splitmix64
from lamda.data.order import SLOTS, Mixture, make_mixture, make_table, next_samples

WEIGHTS = st.lists(st.floats(1, 20), min_size=1, max_size=13)


def table_of(weights):
    return make_table({str(number): weight for number, weight in enumerate(weights)})


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


@settings(max_examples=10, deadline=None)
@given(WEIGHTS, st.integers(0, 200_000))
def test_every_source_hands_out_its_rows_in_order_and_without_gaps(weights, sample):
    with patch("lamda.data.order.SLOTS", 512):
        mixture = Mixture((table_of(weights),))
    sources, rows = mixture.rows(np.arange(40_000))
    for source in range(len(weights)):
        own = rows[sources == source]
        assert np.array_equal(own, np.arange(len(own)))
    before, _ = mixture.rows(np.arange(sample))
    assert np.array_equal(mixture.rows_before(sample), np.bincount(before, minlength=len(weights)))


@settings(max_examples=10, deadline=None)
@given(WEIGHTS, st.integers(1, 3 * SLOTS), st.integers(0, 2 * SLOTS))
def test_any_run_of_samples_has_each_source_by_its_weight_to_a_slot(weights, length, start):
    table = table_of(weights)
    exact = np.array(weights) / sum(weights) * SLOTS
    assert np.abs(table.count - exact).max() < 1
    assert table.count.sum() == SLOTS
    found = table.rows_before(start + length) - table.rows_before(start)
    share = table.count * length / SLOTS
    assert (found > share - 2).all()
    assert (found < share + 2).all()
    # from the beginning of a round, to one slot but for the mass of many others that are due together
    assert np.abs(table.rows_before(start) - table.count * start / SLOTS).max() < 2


@pytest.mark.parametrize("weights", [[2.5] * 2, [1.0] * 3, [7.0] * 8])
def test_equal_sources_are_all_in_every_batch(weights):
    slots = np.tile(table_of(weights).slots, 2)
    size = len(weights) + 1 if SLOTS % len(weights) else len(weights)
    for start in range(SLOTS):
        assert len(set(slots[start : start + size].tolist())) == len(weights)


def test_a_source_too_small_for_a_slot_is_refused_by_name():
    weights = {"books": 1.0, "tiny": 0.4 / SLOTS, "web": 3.0}
    with pytest.raises(UserError, match=r"the weight of source 'tiny' is less than 1 in 16,384 rows"):
        make_table(weights)
    assert make_table({**weights, "tiny": 5 / SLOTS}).count.tolist()[1] == 1


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


@settings(max_examples=10, deadline=None)
@given(st.lists(WEIGHTS, min_size=2, max_size=3), st.integers(1, 30_000), st.integers(1, 30_000))
def test_weights_that_change_at_a_sample_lose_and_repeat_no_row(stages, first, second):
    count = min(map(len, stages))
    names = [f"s{number}" for number in range(count)]
    starts = (0, first, first + second)[: len(stages)]
    staged = [(start, dict(zip(names, weights, strict=False))) for start, weights in zip(starts, stages, strict=True)]
    with patch("lamda.data.order.SLOTS", 512):
        mixture, unchanged = make_mixture(names, staged), make_mixture(names, staged[:1])
    sources, rows = mixture.rows(np.arange(70_000))
    for source in range(count):
        own = rows[sources == source]
        assert np.array_equal(own, np.arange(len(own)))
    for sample in (first - 1, first, first + 1, 65_432):
        assert np.array_equal(mixture.rows_before(sample), np.bincount(sources[:sample], minlength=count))
    assert np.array_equal(sources[:first], unchanged.rows(np.arange(first))[0])
    assert np.array_equal(mixture.max_slots, np.max([table.count for table in mixture.tables], axis=0))


def test_a_mixture_has_its_shares_exactly_in_every_round():
    """LaMDA's own shares are whole numbers of slots."""
    shares = np.array([50, 12.5, 12.5, 12.5, 6.25, 6.25])
    sources, _ = Mixture((table_of(shares),)).rows(np.arange(3 * SLOTS, 4 * SLOTS))
    assert np.array_equal(np.bincount(sources), shares * SLOTS / 100)
