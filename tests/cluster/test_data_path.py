"""What the data path is said to deliver, against the lanes that ranks open."""

import numpy as np
import pytest

from lamda.cluster.data_path import FEWEST, MOST, data_rates
from lamda.config.schema import DataConfig
from lamda.data import lanes
from lamda.data.order import make_table


@pytest.mark.parametrize(("count", "ranks"), [(60, 512), (60, 64), (60, 4), (8, 128)])
def test_a_rank_encodes_at_least_the_lanes_that_the_order_gives_it(count, ranks):
    """Rows of a step, sorted by lane, go to the ranks in equal runs."""
    steps, table = 60, make_table([(1.0, [1.0] * count)])
    of_samples, _ = table.rows(np.arange(steps * 4 * ranks))
    of_ranks = np.sort(of_samples.reshape(steps, -1)).reshape(steps, ranks, -1)
    opened = min(len(np.unique(of_ranks[:, rank])) for rank in range(ranks))
    told = data_rates(DataConfig(lanes=count), ranks=ranks, tokens_per_second=1e6)
    assert told.encoded == (1e6 / min(ranks, count),) * 2
    assert told.encoded[0] <= 1e6 * opened / count
    assert (told.rank, told.blocks) == (1e6 / ranks, 2e6)


def test_without_a_number_of_lanes_the_default_ones_are_the_bounds():
    assert (FEWEST, MOST) == (lanes.FEWEST, lanes.MOST)
    assert data_rates(DataConfig(), ranks=512, tokens_per_second=1e6).encoded == (1e6 / 64, 1e6 / 8)
