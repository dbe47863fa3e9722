from types import SimpleNamespace

import pytest
import torch

from adaptive.confidence import CONFIDENCES
from adaptive.policy import OperatingPoint, Policy
from adaptive.routing import auroc, four_way, oracle, routing


def test_auroc_counts_pairs_and_half_of_the_ties():
    score, positive = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), torch.tensor([True, False, True, False, False])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive].tolist() for b in score[~positive].tolist()]
    assert auroc(score, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(score, torch.ones(5, dtype=torch.bool)) is None
    assert auroc(score, torch.zeros(5, dtype=torch.bool)) is None
    assert auroc(score * torch.nan, positive) is None


CORRECT = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1]]).bool()


def test_the_oracle_takes_the_first_exit_that_is_right():
    assert oracle(CORRECT, [10, 40]) == {
        "accuracy": pytest.approx(5 / 6),
        "macs": pytest.approx((4 * 10 + 2 * 40) / 6),
    }


def test_the_four_ways_are_of_those_that_are_deferred():
    met = four_way(CORRECT, torch.tensor([0, 1, 1, 1, 1, 0]))
    assert met == {"right_right": 1, "right_wrong": 1, "wrong_right": 1, "wrong_wrong": 1}


def test_routing_tells_it_all():
    confidence = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.8], [1.0] * 6])
    scores = torch.stack([confidence] * len(CONFIDENCES))
    tables = SimpleNamespace(confidence=confidence, correct=CORRECT, scores=scores)
    policy = Policy.of([0.5, -1e8])
    point = OperatingPoint(policy, 0.5, 30.0, [0.5, 0.5])
    found = routing(tables, point, [10, 40], [11, 43])
    assert found.point is point and (found.samples, found.deferred) == (6, pytest.approx(4 / 6))
    assert found.flops == pytest.approx(2 * (2 * 11 + 4 * 43) / 6)
    assert sum(found.four_way.values()) == 4 and found.auroc.keys() == CONFIDENCES.keys()
    assert found.auroc["max_prob"] == [auroc(confidence[0], CORRECT[0])]
