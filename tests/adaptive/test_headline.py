import pytest
import torch

from adaptive.exit_tables import ExitFigures, ExitTables
from adaptive.headline import headline_of
from adaptive.intervals import Estimate
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY

# 100 images: exit 0 knows the first 60 and is sure of the first 50, exit 1 knows 5 to 94.
RIGHT = torch.stack([torch.arange(100) < 60, (torch.arange(100) >= 5) & (torch.arange(100) < 95)])
SURE = torch.stack([torch.arange(100) < 50, torch.ones(100)]).double()
TEST = ExitTables(SURE, RIGHT, RIGHT, SURE, SURE, SURE[None], torch.zeros(100), torch.zeros(100))
EXITS = [ExitFigures(0, 10, 10, 1, 0.6, 1), ExitFigures(1, 60, 45, 1, 0.9, 1)]


@pytest.fixture
def headline():
    policy = Policy((0.5, EVERYBODY), name="p=1", accuracy=0.93, macs=30.0, shares=(0.6, 0.4))
    point = policy.simulate(TEST, [10, 60])
    return headline_of("row 4", "the cheapest", TEST, point, EXITS)


def test_headline_compares_with_the_network_without_earlier_heads(headline):
    assert (headline.title, headline.reason, headline.num_images) == ("row 4 (p=1)", "the cheapest", 100)
    assert (headline.accuracy.value, headline.macs.value) == (0.95, 35)
    assert (headline.static_accuracy.value, headline.static_macs) == (0.9, 45)
    assert headline.difference.value == pytest.approx(0.05)
    assert headline.fewer_macs.value == pytest.approx(45 / 35)  # and not 60 / 35
    assert headline.fewer_than_all.value == pytest.approx(60 / 35)


def test_intervals_are_over_images_and_paired(headline):
    for name in ("accuracy", "macs", "static_accuracy", "difference", "fewer_macs", "fewer_than_all"):
        estimate = getattr(headline, name)
        assert isinstance(estimate, Estimate) and estimate.low < estimate.value < estimate.high
    # Both are wrong about the same five images; about five others only the static network is.
    assert headline.difference.low > 0 and headline.difference.high == pytest.approx(0.1, abs=0.011)
    assert headline.fewer_macs.low == pytest.approx(45 / headline.macs.high)
    assert headline.macs.high - headline.macs.low == pytest.approx(2 * 1.96 * 25 / 10, rel=0.1)
