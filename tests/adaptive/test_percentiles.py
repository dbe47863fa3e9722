"""What few requests prove of a percentile: the published numbers, and what coins really do."""

import numpy as np
import pytest

from adaptive.percentiles import Latencies, confirmed, fewest, holds, percentile


@pytest.mark.parametrize(
    ("share", "requests"), [(0.9, 64), (0.95, 130), (0.97, 219), (0.99, 662), (0.999, 6636)]
)
def test_the_fewest_requests_are_the_published_ones(share, requests):
    assert fewest(share) == requests
    latencies = np.arange(requests, dtype=float)
    assert confirmed(latencies, share) == requests - 1 and confirmed(latencies[1:], share) is None
    assert holds(1, requests, share) and not holds(1, requests - 1, share)


def test_as_many_are_discarded_as_by_the_generator():
    assert confirmed(np.arange(300.0), 0.9) == 300 - 18  # its log says: "Would discard 17"


def test_a_confirmed_percentile_is_seldom_too_low():
    rng = np.random.default_rng(0)
    runs = np.sort(rng.random((2000, 700)))
    too_low = np.mean([confirmed(run, 0.99) < 0.99 for run in runs])
    assert 0 < too_low < 0.01
    assert np.mean([percentile(run, 0.99) < 0.99 for run in runs]) > 0.3  # which the percentile itself is


def test_latencies_of_requests():
    found = Latencies.of(np.arange(1000.0)[::-1])
    assert (found.requests, found.mean_ms) == (1000, 499.5)
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (500, 900, 990)
    assert 990 < found.p99_below_ms < 1000 and 900 < found.p90_below_ms < 930
    few = Latencies.of(np.array([1.0, np.inf]))
    assert few.p50_ms == few.p99_ms == np.inf and few.p90_below_ms is few.p99_below_ms is None
