from types import SimpleNamespace

import pytest

from adaptive.costs import StageCosts, stages_for


def network(befores, reads):
    return SimpleNamespace(
        num_exits=len(befores), stages_before=befores.__getitem__, reads_logits=reads.__getitem__
    )


CHAIN = network([(), (0,), (0, 1)], [False] * 3)
COSTS = StageCosts.of(CHAIN, [10, 20, 30], [1, 2, 3])


def test_every_exit_pays_for_what_ran_before_it():
    assert COSTS.leaving() == [11, 33, 66]


def test_an_exit_that_is_off_does_not_pay_for_its_head():
    assert COSTS.leaving({0}) == [0, 32, 65]
    assert COSTS.leaving({1}) == [11, 11, 64]
    assert COSTS.alone() == [11, 32, 63]


def test_a_head_that_a_later_stage_reads_is_paid_for():
    costs = StageCosts.of(network([(), (0,), (0, 1)], [True, False, False]), [10, 20, 30], [1, 2, 3])
    assert costs.leaving({0, 1}) == [0, 0, 64]


def test_a_network_of_a_cascade_that_is_off_costs_nothing():
    pair = network([(), (0,), ()], [False] * 3)  # two exits, then another network
    costs = StageCosts.of(pair, [10, 20, 30], [1, 2, 3])
    assert costs.leaving() == [11, 33, 66]
    assert costs.leaving({0}) == [0, 32, 65]
    assert costs.leaving({1}) == [11, 11, 44]
    assert costs.leaving({0, 1}) == [0, 0, 33]
    assert stages_for(pair, [1]) == [0, 1] and stages_for(pair, [2]) == [2]


@pytest.mark.parametrize("off", [(), (0,), (1,), (0, 1)])
def test_costs_never_fall(off):
    costs = COSTS.leaving(off)
    assert costs == sorted(costs)
