from dataclasses import replace

import pytest
import torch

from adaptive.choices import Calibration, find_policies, risk_front
from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.exits import Exits
from adaptive.guarantees import Demand, guaranteed, split_calibration
from adaptive.reading import Reading
from adaptive.rules import rules_of
from adaptive.stage_timing import StageTimes

COSTS = StageCosts((10e6, 20e6, 20e6), (1e6, 1e6, 1e6), ((), (0,), (0, 1)), (False,) * 3)


def draw_images():
    """Logits of 400 images: confidence is the chance of being right, and later exits are surer."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (400,), generator=draw)
    ease = torch.rand(400, generator=draw)
    exits = []
    for k in range(3):
        right = torch.rand(400, generator=draw) < 0.3 + 0.4 * ease + 0.1 * k
        answer = torch.where(right, targets, (targets + 1) % 4)
        exits.append((4 * ease + k)[:, None] * torch.nn.functional.one_hot(answer, 4))
    return exits, targets


LOGITS, TARGETS = draw_images()


@pytest.fixture(scope="module")
def calib():
    return Calibration(ExitTables.of(LOGITS, TARGETS), Reading(), COSTS)


def found(calib, **flags):
    exits = Exits(**flags)
    return find_policies(exits, rules_of(exits, calib.costs.leaving()), calib)


def test_goals_choose_on_the_front_of_a_search(calib):
    result = found(calib, budget=(20e6, 40e6), accuracy=(0.6,))
    names = [choice.name for choice in result.choices]
    assert names == ["budget 20 M", "budget 40 M", "accuracy 60 %"]
    cheap, dear, accurate = (choice.policy for choice in result.choices)
    assert all(policy in result.front for policy in (cheap, dear, accurate))
    assert cheap.macs <= 20e6 < dear.macs <= 40e6 and cheap.accuracy <= dear.accuracy
    assert accurate.accuracy >= 0.6 and accurate.macs == min(
        p.macs for p in result.front if p.accuracy >= 0.6
    )
    assert len(result.sweep) == 39


def test_goals_choose_among_quotas_where_asked(calib):
    result = found(calib, policies="quotas", budget=(30e6,))
    (choice,) = result.choices
    assert result.front == [] and choice.policy == result.sweep[int(choice.name.removeprefix("row "))]


def test_policies_given_by_hand_stand_beside_goals(calib):
    result = found(calib, row=(2,), shares=(0.5, 0.3), budget=(30e6,))
    assert [choice.name for choice in result.choices] == ["row 2", "budget 30 M"]
    assert [choice.name for choice in found(calib, shares=(0.5, 0.3)).choices] == ["row 39"]


def test_a_latency_is_met_in_milliseconds(calib):
    times = StageCosts((1.0, 2.0, 2.0), (0.5, 0.5, 0.5), COSTS.before, COSTS.fixed, "ms")
    timed = replace(calib, times=StageTimes(times, (times,), 6.0))
    result = found(timed, latency=("4ms",))
    assert all(policy.latency_ms > 0 for policy in result.front)
    (choice,) = result.choices
    shares = torch.tensor(choice.policy.shares, dtype=torch.float64)
    mean = (shares * torch.tensor(times.leaving(choice.policy.off))).sum().item()
    assert choice.name == "latency 4 ms" and choice.policy.latency_ms == pytest.approx(mean) and mean <= 4
    assert choice.policy.macs == choice.policy.simulate(calib.tables, COSTS).macs > 1e6
    (half,) = found(timed, latency=("1.6ms",), latency_of="p50").choices
    assert half.name == "latency 1.6 ms (p50)"
    assert half.policy.latency_ms == pytest.approx(1.5) and half.policy.shares[0] >= 0.5


@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_a_guarantee_comes_with_its_policy(calib, method):
    (choice,) = found(calib, drop=(0.25,), confidence_level=0.9, guarantee=method).choices
    given = choice.policy.guarantee
    assert choice.name == "guaranteed drop 25 %" and choice.reason == given.statement
    assert given.feasible and given.images == 200 and given.observed <= given.bound == 0.25
    assert choice.policy.macs < COSTS.leaving()[-1]


@pytest.mark.parametrize("answer", ["exit", "mean"])
def test_what_cannot_be_guaranteed_is_never_to_exit_early(calib, answer):
    reading = Reading(answer=answer)
    calib = replace(calib, tables=ExitTables.of(LOGITS, TARGETS, reading), reading=reading)
    (choice,) = found(calib, answer=answer, drop=(0.001,), confidence_level=0.95).choices
    testing = split_calibration(400)[1]
    right = calib.tables.full_correct[testing].double().mean().item()
    assert choice.policy.accuracy == pytest.approx(right)
    assert not choice.policy.guarantee.feasible and choice.policy.off == (0, 1)
    assert choice.policy.macs == COSTS.alone()[-1]


def test_a_budget_is_guaranteed_as_a_share_of_the_whole_cost(calib):
    (choice,) = found(calib, budget=(45e6,), confidence_level=0.9).choices
    assert choice.policy.guarantee.bound == pytest.approx(45 / 51)  # of the last exit alone
    assert choice.policy.guarantee.feasible and choice.policy.macs < 45e6
    with pytest.raises(
        ValueError, match=r"^--budget 5.1e\+07 needs no guarantee: the last exit alone takes 5.1e"
    ):
        found(calib, budget=(51e6,), confidence_level=0.9)


def test_a_search_for_a_guarantee_does_no_harm():
    """Where the first exit is as accurate as the last one, the front of accuracy ends before the latter."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (4000,), generator=draw)
    ease = torch.rand(4000, generator=draw)
    exits = []
    for _ in range(3):
        right = torch.rand(4000, generator=draw) < 0.5 + 0.7 * ease
        answer = torch.where(right, targets, (targets + 1) % 4)
        exits.append((4 * ease)[:, None] * torch.nn.functional.one_hot(answer, 4))
    calib = Calibration(ExitTables.of(exits, targets, Reading()), Reading(), COSTS)
    saved = {}
    for risk in ("harm", "cost"):
        found = risk_front(risk, calib.tables, costs=COSTS, reading=Reading())
        demand = Demand("harm", 0.01, 0.1)
        policy, guarantee = guaranteed(found, calib.tables, calib.tables, COSTS, demand)
        saved[risk] = COSTS.alone()[-1] / policy.simulate(calib.tables, COSTS).macs
        assert guarantee.feasible == (risk == "harm")
    assert saved["harm"] > 1.5 and saved["cost"] == 1
    (choice,) = find_policies(Exits(harm=(0.02,), confidence_level=0.9), [], calib).choices
    assert choice.policy.guarantee.feasible and choice.policy.guarantee.observed <= 0.02
    outcome = choice.policy.simulate(calib.tables, COSTS)
    assert choice.policy.accuracy == pytest.approx(outcome.accuracy, abs=0.03)


def test_a_budget_that_sends_all_to_the_first_exit_is_guaranteed(calib):
    (choice,) = found(calib, budget=(11.5e6,), confidence_level=0.9).choices
    assert choice.policy.guarantee.feasible and choice.policy.macs <= 11.5e6


def test_guaranteed_policies_are_told_apart_by_their_bounds(calib):
    names = [choice.name for choice in found(calib, harm=(0.2, 0.3), confidence_level=0.9).choices]
    assert names == ["guaranteed harm 20 %", "guaranteed harm 30 %"]
