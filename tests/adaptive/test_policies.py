from types import SimpleNamespace

import pytest
import torch

from adaptive.policies import Policies

COSTS = [10, 40]


def tables(right):
    confidence = torch.linspace(0.1, 1, 10).repeat(2, 1)
    return SimpleNamespace(confidence=confidence, correct=torch.tensor([[False] * 4 + [True] * 6, right]))


CALIB = tables([True] * 10)


def test_points_given_by_hand_follow_the_sweep_and_are_used():
    policies = Policies("msdnet", 2, shares=[0.7], thresholds=[0.55])
    rows = policies.rows(CALIB, CALIB, COSTS, {"confidence": "max_prob"})
    assert [row["policy"] for row in rows[39:]] == ["shares 0.7", "threshold 0.55"]
    assert [row["shares"] for row in rows[39:]] == [pytest.approx([0.7, 0.3]), pytest.approx([0.5, 0.5])]
    assert rows[-1]["macs"] == pytest.approx(0.5 * 10 + 0.5 * 40) and rows[-1]["confidence"] == "max_prob"
    assert policies.choose(rows, CALIB) == [39, 40]


def test_a_row_is_chosen_by_budget_or_accuracy():
    policies = Policies("msdnet", 2)
    rows = policies.rows(CALIB, CALIB, COSTS, {})
    (cheap,) = policies.choose(rows, CALIB, budget=20)
    assert rows[cheap]["calib_macs"] <= 20
    (even,) = policies.choose(rows, CALIB)  # as good as the last exit, for least
    assert rows[even]["calib_accuracy"] == 1 and rows[even]["calib_macs"] < 40
    (modest,) = policies.choose(rows, CALIB, accuracy=0.8)
    assert rows[modest]["calib_accuracy"] >= 0.8 and rows[modest]["calib_macs"] < rows[even]["calib_macs"]
    assert Policies("msdnet", 2, picked=[3]).choose(rows, CALIB, budget=1) == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [0.5, 0.5]}, "shares .* for 2 exits; give one per exit but the last"),
        ({"thresholds": []} | {"shares": [1.2]}, "at most 1 in all"),
        ({"thresholds": [1.0, 2.0]}, "2 router thresholds for 2 exits"),
        ({"picked": [39]}, "--row 39, but msdnet has rows 0 to 38"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Policies("msdnet", 2, **options)
