"""A thousand races of four processes for one run directory: at no moment two writers, and in no race none."""

import pytest

from tests.storage.races import KINDS, race

ROUNDS = 1000


@pytest.mark.parametrize("kind", KINDS)
def test_never_two_writers(tmp_path, kind):
    assert min(race(tmp_path, kind=kind, rounds=ROUNDS)) >= 1
