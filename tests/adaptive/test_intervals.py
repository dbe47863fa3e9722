import math

import pytest
import torch

from adaptive.intervals import Estimate, mean_estimates, median_ratio, share_estimates, spread


def test_interval_of_a_share_is_the_binomial_one():
    right = torch.arange(400) < 340  # 85 %
    (share,) = mean_estimates(right[None])
    assert share.value == 0.85
    half = 1.96 * math.sqrt(0.85 * 0.15 / 400)
    assert share.low == pytest.approx(0.85 - half, abs=0.004)
    assert share.high == pytest.approx(0.85 + half, abs=0.004)
    assert mean_estimates(right[None]) == [share]  # the same every time


def test_shares_are_drawn_as_means_are():
    """A count is all that matters of samples that have a property or not."""
    right = torch.stack([torch.arange(400) < count for count in (340, 13, 400, 0)])
    means, shares = mean_estimates(right), share_estimates([340, 13, 400, 0], 400)
    for mean, share in zip(means, shares, strict=True):
        assert share.value == mean.value
        assert (share.low, share.high) == pytest.approx((mean.low, mean.high), abs=1 / 400)
    assert shares[0].low < 0.85 < shares[0].high and shares[2:] == [Estimate(1, 1, 1), Estimate(0, 0, 0)]
    assert share_estimates([340, 13, 400, 0], 400) == shares  # the same every time


def test_differences_are_paired():
    """Two classifiers that agree on nearly all images differ by less than either is uncertain."""
    first, second = torch.arange(400) < 300, torch.arange(400) < 304
    one, other, more = mean_estimates(torch.stack([first, second, second.double() - first.double()]))
    assert more.value == pytest.approx(0.01) and 0 < more.low < more.high < 0.025
    assert one.high - one.low > 0.07 and other.high - other.low > 0.07


def test_distinct_values_are_drawn_one_by_one():
    torch.manual_seed(0)
    values = torch.randn(1, 500, dtype=torch.float64)
    (mean,) = mean_estimates(values)
    assert mean.value == values.mean().item()
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(500), rel=0.05)


def test_samples_that_are_all_alike_leave_no_doubt():
    assert mean_estimates(torch.ones(2, 9)) == [Estimate(1, 1, 1)] * 2


def test_ratio_of_rounds_is_paired():
    """A machine that slows down slows both: the ratio of every round is 2."""
    below = [1.0, 1.5, 4.0, 2.0, 1.0, 3.0, 1.2]
    assert median_ratio([2 * one for one in below], below) == Estimate(2, 2, 2)


def test_ratio_of_rounds_varies_as_its_median_does():
    found = median_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [2.0] * 9)
    assert (found.value, found.low, found.high) == (2.5, 1, 4)  # the second and the eighth, 96 % in theory
    assert median_ratio([3.0], [2.0]) == Estimate(1.5, 1.5, 1.5)


def test_a_quotient_turns_the_bounds_round():
    assert Estimate(2, 1, 4).below(8) == Estimate(4, 2, 8)


def test_the_spread_of_rounds_leaves_out_their_tails():
    found = spread(torch.arange(101).flip(0))
    assert (found.value, found.low, found.high) == (50, 2.5, 97.5)
    assert spread(torch.tensor([0.25])) == Estimate(0.25, 0.25, 0.25)
