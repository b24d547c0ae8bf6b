"""The curve in a terminal goes where the values go."""

import numpy as np
import pytest

from lamda.runs.watch import draw_curve

# The Unicode standard numbers a braille cell's dots 1 2 3 7 down its left side and 4 5 6 8 down its right one.
PLACES = {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (0, 1), 4: (1, 1), 5: (2, 1), 6: (3, 0), 7: (3, 1)}


def dots(lines):
    """[4 x lines, 2 x columns], True where there is a dot."""
    picture = np.zeros((4 * len(lines), 2 * len(lines[0])), dtype=bool)
    for y, line in enumerate(lines):
        for x, cell in enumerate(line):
            for bit, (down, right) in PLACES.items():
                picture[4 * y + down, 2 * x + right] = bool((ord(cell) - 0x2800) >> bit & 1)
    return picture


def test_a_falling_line_is_a_diagonal_without_holes():
    lines, low, high = draw_curve(np.linspace(1.0, 0.0, 16), width=8, height=4)
    assert low == 0
    assert high == pytest.approx(0.95, abs=0.01)
    picture = dots(lines)
    middles = [np.flatnonzero(column).mean() for column in picture.T]
    assert middles == sorted(middles)
    assert (np.flatnonzero(picture[:, 0]).min(), np.flatnonzero(picture[:, -1]).max()) == (0, 15)
    assert all(np.diff(np.flatnonzero(column)).max(initial=1) == 1 for column in picture.T)


def test_a_jump_is_drawn_from_one_level_to_the_other():
    picture = dots(draw_curve(np.repeat([0.0, 7.0], 10), width=10, height=4)[0])
    assert picture.any(axis=1).all()


def test_every_column_spans_its_least_to_its_greatest_value():
    values = np.array([0.0, 15.0, 3.0, 12.0] * 20)
    picture = dots(draw_curve(values, width=2, height=4)[0])
    assert picture.shape == (16, 4)
    assert picture.all()


def test_what_is_not_finite_is_a_gap():
    values = np.array([5.0, 5.0, 4.0, np.nan, np.nan, 1.0, 1.0, 0.0])
    picture = dots(draw_curve(values, width=4, height=2)[0])
    assert picture.any(axis=0).tolist() == [True, True, True, False, False, True, True, True]


def test_first_losses_do_not_flatten_the_rest():
    values = np.concatenate([[100.0] * 4, np.linspace(3, 2, 196)])
    lines, low, high = draw_curve(values, width=50, height=8)
    assert (low, high < 3.1) == (2, True)
    assert dots(lines)[0].any()


@pytest.mark.parametrize("values", [[], [np.nan], [np.inf, np.nan]])
def test_nothing_finite_is_an_empty_picture(values):
    lines, low, high = draw_curve(np.array(values), width=6, height=3)
    assert lines == [" " * 6] * 3
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 59, 60, 61, 1000])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_one_value_however_often_is_a_level_line(count, value):
    lines, low, high = draw_curve(np.full(count, value), width=30, height=5)
    assert low == high == value
    picture = dots(lines)
    assert picture[-1].all()
    assert not picture[:-1].any()
