"""Sums by bin, whichever device they are written for."""

import torch

from reapkit.observe.accumulate import bin_sums, sorted_bin_sums


def test_sorted_sums_equal_added_ones_and_empty_bins_are_zero():
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(500, 3, dtype=torch.float64, generator=draw)
    key = torch.randint(0, 40, (500,), generator=draw)
    key[key == 7] = 8
    added, sorted_ = bin_sums(values, key, 41), sorted_bin_sums(values, key, 41)
    assert torch.allclose(added, sorted_, rtol=1e-14)
    assert not sorted_[7].any() and not sorted_[40].any()
    expected = sum((values[n] for n in range(500) if key[n] == 3), torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(sorted_[3], expected, rtol=1e-14)
