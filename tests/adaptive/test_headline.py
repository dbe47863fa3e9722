import pytest
import torch

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.goals import Choice
from adaptive.headline import headline_of
from adaptive.intervals import Estimate
from adaptive.policy import Policy
from adaptive.thresholds import EVERYBODY

# 100 images: exit 0 knows the first 60 and is sure of the first 50, exit 1 knows 5 to 94.
RIGHT = torch.stack([torch.arange(100) < 60, (torch.arange(100) >= 5) & (torch.arange(100) < 95)])
SURE = torch.stack([torch.arange(100) < 50, torch.ones(100)]).double()
TEST = ExitTables(SURE, RIGHT, RIGHT, SURE, SURE, SURE[None], torch.ones(100), RIGHT[1])
COSTS = StageCosts((5, 39), (15, 1), ((), (0,)), (False, False))  # 20 and 60, the last exit alone 45


@pytest.fixture
def headline():
    policy = Policy((0.5, EVERYBODY), name="p=1", accuracy=0.93, macs=30.0, shares=(0.6, 0.4))
    return headline_of(Choice("row 4", policy, "the cheapest"), TEST, COSTS)


def test_headline_compares_with_the_network_without_earlier_heads(headline):
    assert (headline.title, headline.reason, headline.num_images) == ("row 4 (p=1)", "the cheapest", 100)
    assert (headline.accuracy.value, headline.macs.value) == (0.95, 40)
    assert (headline.static_accuracy.value, headline.static_macs) == (0.9, 45)
    assert headline.difference.value == pytest.approx(0.05)
    assert headline.fewer_macs.value == pytest.approx(45 / 40)  # and not 60 / 40
    assert headline.fewer_than_all.value == pytest.approx(60 / 40)


def test_intervals_are_over_images_and_paired(headline):
    for name in ("accuracy", "macs", "static_accuracy", "difference", "fewer_macs", "fewer_than_all"):
        estimate = getattr(headline, name)
        assert isinstance(estimate, Estimate) and estimate.low < estimate.value < estimate.high
    # Both are wrong about the same five images; about five others only the static network is.
    assert headline.difference.low > 0 and headline.difference.high == pytest.approx(0.1, abs=0.011)
    assert headline.fewer_macs.low == pytest.approx(45 / headline.macs.high)
    assert headline.macs.high - headline.macs.low == pytest.approx(2 * 1.96 * 20 / 10, rel=0.1)
