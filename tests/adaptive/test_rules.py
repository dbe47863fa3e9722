from types import SimpleNamespace

import pytest
import torch

from adaptive.exits import Exits
from adaptive.rules import Rule, choose, policies_of, rules_of
from adaptive.thresholds import EVERYBODY, NOBODY, quota_thresholds

COSTS = [10, 40]


def tables(right):
    confidence = torch.linspace(0.1, 1, 10).repeat(2, 1)
    return SimpleNamespace(confidence=confidence, correct=torch.tensor([[False] * 4 + [True] * 6, right]))


CALIB = tables([True] * 10)


def sweep(confidence="max_prob", **exits):
    return policies_of(rules_of(Exits(**exits), COSTS), CALIB, COSTS, confidence)


def chosen(**exits):
    """The policies that are chosen on calib."""
    policies = sweep(**{name: value for name, value in exits.items() if name not in ("budget", "accuracy")})
    return choice_of(policies, **exits).rows, policies


def choice_of(policies, **exits):
    return choose(policies, Exits(**exits), CALIB.correct[-1].double().mean().item())


# Sweeps and choices


def test_points_given_by_hand_follow_the_sweep_and_are_used():
    rows, policies = chosen(shares=(0.7,), router_threshold=(0.55,))
    assert [policy.name for policy in policies[39:]] == ["shares 0.7", "threshold 0.55"]
    points = [policy.simulate(CALIB, COSTS) for policy in policies]
    assert [point.shares for point in points[39:]] == [pytest.approx([0.7, 0.3]), pytest.approx([0.5, 0.5])]
    assert points[-1].macs == pytest.approx(0.5 * 10 + 0.5 * 40) and policies[-1].confidence == "max_prob"
    assert rows == [39, 40]


def test_a_row_is_chosen_by_budget_or_accuracy():
    (cheap,), policies = chosen(budget=20)
    assert policies[cheap].macs <= 20
    (even,), _ = chosen()  # as good as the last exit, for least
    assert policies[even].accuracy == 1 and policies[even].macs < 40
    (modest,), _ = chosen(accuracy=0.8)
    assert policies[modest].accuracy >= 0.8 and policies[modest].macs < policies[even].macs
    assert chosen(row=(3,), budget=1)[0] == [3]


def test_a_choice_says_why():
    policies = sweep()
    judged = "; all 39 were judged on the calibration images"
    within = sum(policy.macs <= 20 for policy in policies)
    reason = choice_of(policies, budget=20).reason
    assert reason == f"the most accurate of {within} settings within 2e-05 M multiply-adds{judged}"
    reaching = sum(policy.accuracy >= 0.8 for policy in policies)
    reason = choice_of(policies, accuracy=0.8).reason
    assert reason == f"the cheapest of {reaching} settings that reach 80.00 %{judged}"
    assert "settings that reach 100.00 %, the last exit's accuracy; all" in choice_of(policies).reason
    nothing = choose(policies[:2], Exits(), 1.01).reason
    assert nothing.startswith("the most accurate setting, since none reaches 101.00 %, the last exit's")
    assert choice_of(policies, row=(3,)).reason == "given by hand"
    assert choice_of(policies, row=(3, 1)).reason == "given by hand, the first of these"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.5, 0.5)}, "shares .* for 2 exits; give one per exit but the last"),
        ({"router_threshold": (), "shares": (1.2,)}, "at most 1 in all"),
        ({"router_threshold": (1.0, 2.0)}, "2 router thresholds for 2 exits"),
        ({"row": (39,)}, "--row 39, but msdnet has rows 0 to 38"),
        ({"router_threshold": (1.5,)}, "threshold 1.5 of max_prob: accepted: from 0 to 1; 1e8: nobody"),
        ({"budget": 9}, "a budget of 9 multiply-adds is below the cheapest setting's 10"),
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
            "", lambda confidence, share=share: quota_thresholds(confidence, torch.tensor([share, 1 - share]))
        )
        for share in (0.5, 0.0)
    ]
    half, nobody = policies_of(rules, calib, [10, 30], "max_prob")
    assert half.thresholds == (0.75, EVERYBODY)
    assert (half.accuracy, half.macs, half.shares) == (1.0, 20, (0.5, 0.5))
    point = half.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, point.shares) == (0.5, 20, [0.5, 0.5]) and point.policy is half
    assert nobody.thresholds == (NOBODY, EVERYBODY)
    point = nobody.simulate(test, [10, 30])
    assert (point.accuracy, point.macs, nobody.accuracy) == (0.75, 30, 1.0)


def test_an_accuracy_that_no_setting_reaches_is_refused():
    poor = tables([False] * 5 + [True] * 5)
    policies = policies_of(rules_of(Exits(), COSTS), poor, COSTS, "max_prob")
    best = max(policy.accuracy for policy in policies)
    with pytest.raises(ValueError, match=rf"^an accuracy of 0.99 is above the best setting's {best:.4g}$"):
        choose(policies, Exits(accuracy=0.99), 0.5)
    (nearest,) = choose(policies, Exits(), 0.99).rows  # nobody asked for an accuracy
    assert policies[nearest].accuracy == best
