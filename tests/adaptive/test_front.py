from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.front import MOST, decide_alike, evenly_spaced, front_rows
from adaptive.policy import Policy

COSTS = StageCosts(trunks=(1e6, 2e6), heads=(1e5, 1e5), before=((), (0,)), fixed=(False, False))


@pytest.fixture(scope="module")
def tables_of_test():
    torch.manual_seed(0)
    targets = torch.randint(5, (400,))
    shifts = torch.nn.functional.one_hot(targets, 5)
    return ExitTables.of([torch.randn(400, 5) + (1 + k) * shifts for k in range(2)], targets)


def policies(count):
    limits = np.linspace(0.25, 1, count)[::-1]  # the most expensive first
    return [Policy((float(limit), EVERYBODY), name=f"{limit:.3f}", accuracy=0.5) for limit in limits]


def test_a_row_is_what_the_policy_does_to_test_images(tables_of_test):
    alone = Policy((NOBODY, EVERYBODY), off=(0,))
    rows = front_rows([*policies(5), alone], tables_of_test, COSTS, lambda policy: f"deploy {policy.name}")
    assert [row.macs for row in rows] == sorted(row.macs for row in rows) and len(rows) == 6
    for row in rows:
        point = row.policy.simulate(tables_of_test, COSTS)
        assert (row.macs, row.shares) == (point.macs, point.shares)
        assert row.accuracy.value == pytest.approx(point.accuracy)
        assert row.accuracy.low < point.accuracy < row.accuracy.high
        assert row.command == f"deploy {row.policy.name}"
    (off,) = (row for row in rows if row.policy.off)
    assert off.macs == 3.1e6  # without the head that is off


def test_a_long_front_is_thinned_but_not_of_the_policy_to_keep(tables_of_test):
    many = policies(300)
    keep = replace(many[101], model_hash="known by now")
    assert not decide_alike(many[100], keep) and decide_alike(many[101], keep)
    rows = front_rows(many, tables_of_test, COSTS, str, keep=keep)
    costs = [policy.simulate(tables_of_test, COSTS).macs for policy in many]
    assert len(rows) in (MOST, MOST + 1)
    assert (rows[0].macs, rows[-1].macs) == (min(costs), max(costs))
    assert any(row.policy is many[101] for row in rows)
    gaps = np.diff([row.macs for row in rows])
    assert gaps.max() < 3 * (max(costs) - min(costs)) / MOST


def test_evenly_spaced_is_by_cost():
    assert evenly_spaced([1, 2, 3], 3) == [0, 1, 2]
    assert evenly_spaced([0.0, 0.1, 0.2, 0.3, 5.1, 9.9, 10.0], 3) == [0, 4, 6]
    assert evenly_spaced([1.0] * 9, 4) == [0]


def test_policies_that_read_otherwise_do_not_decide_alike():
    one = Policy((0.5, EVERYBODY))
    assert decide_alike(one, replace(one, name="x", accuracy=0.3))
    for other in ({"answer": "best"}, {"confidence": "margin"}, {"temperatures": (1.0, 2.0)}):
        assert not decide_alike(one, replace(one, **other))
