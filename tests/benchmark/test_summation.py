"""What the study of summation counts, on numbers whose sums are known."""

import torch

from benchmarks.summation import added_up, compare, on_ranks


def test_the_order_of_ranks_is_reported_apart_where_it_rounds():
    """1 + 2^-24 + 2^-24 loses both small parts one by one, and keeps them where a rank adds them up first."""
    small = 2.0**-24
    parts = torch.tensor([[1.0, 1.0], [0.0, 0.0], [small, 0.5], [small, 0.5]], dtype=torch.bfloat16)
    assert added_up(parts).tolist() == [1.0, 2.0]
    assert on_ranks(parts, 2).tolist() == [1.0 + 2 * small, 2.0]
    found = compare(parts)
    assert found["ranks"] == {1: 0, 2: 1, 4: 0}
    assert found["rounded"] == 1
    assert found["float64_on_ranks"] == 0


def test_two_micro_batches_add_up_to_the_same_on_any_ranks():
    parts = torch.randn(2, 10_000).mul(torch.logspace(-12, 0, 10_000)).bfloat16()
    assert compare(parts)["ranks"] == {1: 0, 2: 0}
