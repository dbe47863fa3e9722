from types import SimpleNamespace

import pytest
import torch

from adaptive.exits import Exits
from adaptive.reading import Reading
from adaptive.rules import Rule, policies_of, rules_of
from adaptive.thresholds import EVERYBODY, NOBODY, quota_thresholds

COSTS = [10, 40]


def tables(right):
    confidence = torch.linspace(0.1, 1, 10).repeat(2, 1)
    return SimpleNamespace(confidence=confidence, correct=torch.tensor([[False] * 4 + [True] * 6, right]))


CALIB = tables([True] * 10)


def sweep(confidence="max_prob", **exits):
    return policies_of(rules_of(Exits(**exits), COSTS), CALIB, COSTS, Reading(confidence))


def test_policies_given_by_hand_follow_the_sweep():
    policies = sweep(shares=(0.7,), router_threshold=(0.55,), mapped_accuracy=(0.9,))
    assert [one.name for one in policies[39:]] == ["shares 0.7", "threshold 0.55", "mapped accuracy 90 %"]
    points = [policy.simulate(CALIB, COSTS) for policy in policies]
    shares = [point.shares for point in points[39:41]]
    assert shares == [pytest.approx([0.7, 0.3]), pytest.approx([0.5, 0.5])]
    assert points[40].macs == pytest.approx(0.5 * 10 + 0.5 * 40) and policies[-1].confidence == "max_prob"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 0.5)}, "shares .* for 2 exits; give one per exit but the last"),
        ({"router_threshold": (), "shares": (1.2,)}, "at most 1 in all"),
        ({"router_threshold": (1.0, 2.0)}, "2 router thresholds for 2 exits"),
        ({"row": (39,)}, "--row 39, but msdnet has rows 0 to 38"),
        ({"router_threshold": (1.5,)}, "threshold 1.5 of max_prob: accepted: from 0 to 1; 1e8: nobody"),
        ({"budget": (20, 9)}, "a budget of 9 multiply-adds is below the cheapest setting's 10"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rules_of(Exits(**options), COSTS)


def test_every_row_of_a_sweep_with_equal_names_is_kept():
    policies = sweep(quota_sweep="dyn_perceiver")
    assert len(policies) == 33 and [policy.name for policy in policies[16:18]] == ["dyn_perceiver p=1"] * 2


def test_sweep_chooses_on_calib_and_judges_on_test():
    calib = SimpleNamespace(
        confidence=torch.tensor([[0.75, 0.5], [0.0, 0.0]]),
        correct=torch.tensor([[True, False], [True, True]]),
    )
    test = SimpleNamespace(
        confidence=torch.tensor([[0.875, 0.75, 0.5, 0.25], [0.0] * 4]),
        correct=torch.tensor([[True, False, False, False], [True, True, False, True]]),
    )
    rules = [
        Rule(
            "",
            lambda calib, share=share: quota_thresholds(calib.confidence, torch.tensor([share, 1 - share])),
        )
        for share in (0.5, 0.0)
    ]
    half, nobody = policies_of(rules, calib, [10, 30], Reading())
    assert half.thresholds == (0.75, EVERYBODY)
    assert (half.accuracy, half.macs, half.shares) == (1.0, 20, (0.5, 0.5))
    point = half.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, point.shares) == (0.5, 20, [0.5, 0.5]) and point.policy is half
    assert nobody.thresholds == (NOBODY, EVERYBODY)
    point = nobody.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, nobody.accuracy) == (0.75, 30, 1.0)
