import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from adaptive.exit_tables import ExitTables
from adaptive.guarantees import (
    METHODS,
    Demand,
    Guarantee,
    certified,
    certify,
    guaranteed,
    images_for,
    never_early,
    path_from,
    path_rows,
    smallest_bound,
    split_calibration,
    without_unsure_exits,
)
from adaptive.policy import Policy
from adaptive.risks import RISKS, Outcomes, evidence
from adaptive.thresholds import EVERYBODY, NOBODY, geometric_quotas, quota_thresholds

COSTS = [1.0, 2.0, 4.0]


@pytest.fixture(scope="module")
def population():
    """Tables of 4,000 images, of which later exits know more."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (4000,), generator=generator)
    noise = torch.randn(4000, 5, generator=generator)
    known = torch.nn.functional.one_hot(targets, 5) * 4.0 * torch.rand(4000, 1, generator=generator)
    logits = [1.5 * (known + noise + z * torch.randn(4000, 5, generator=generator)) for z in (0.7, 0.4, 0.0)]
    return ExitTables.of(logits, targets)


@pytest.fixture(scope="module")
def front(population):
    quotas = [geometric_quotas(ratio, 3) for ratio in np.geomspace(0.1, 20, 20).tolist()]
    thresholds = [quota_thresholds(population.part(torch.arange(1000)).confidence, each) for each in quotas]
    return [Policy.of(each) for each in thresholds]


# What holds


@pytest.mark.parametrize(
    "demand",
    [
        Demand("drop", 0.03, 0.1),
        Demand("harm", 0.03, 0.1),
        Demand("disagreement", 0.05, 0.1),
        Demand("error", 0.15, 0.1),
        Demand("cost", 0.6, 0.1),
    ],
)
def test_a_risk_exceeds_its_bound_no_more_often_than_delta(population, front, demand):
    """Even where a policy's risk is just above the bound."""
    path = path_from(front, population.part(torch.arange(1000)), COSTS, demand)
    everything = Outcomes.of(path, population, COSTS)
    risks = everything.risk(demand.risk)
    hard = risks[np.abs(risks - demand.bound).argmin()]
    demand = replace(demand, bound=hard - 1e-9)
    generator, draws, n = np.random.default_rng(0), 200, 400
    early, above, naive = [], [], []
    for _ in range(draws):
        drawn = everything.images(torch.from_numpy(generator.integers(len(population), size=n)))
        passed = certified(drawn, demand)[0]
        early.append(passed > 0)
        above.append(passed > 0 and risks[passed - 1] > demand.bound)
        good = np.flatnonzero(drawn.risk(demand.risk) <= demand.bound)
        naive.append(len(good) > 0 and risks[good[-1]] > demand.bound)
    slack = 3 * math.sqrt(demand.delta * (1 - demand.delta) / draws)
    assert np.mean(above) <= demand.delta + slack
    assert np.mean(early) > 0.5 and np.mean(naive) > demand.delta + slack  # the test can tell


@pytest.mark.parametrize("risk", ["harm", "disagreement"])
def test_the_mean_risk_of_conformal_control_is_below_the_bound(population, front, risk):
    demand = Demand(risk, 0.03, method="crc")
    path = path_from(front, population.part(torch.arange(1000)), COSTS, demand)
    everything, generator = Outcomes.of(path, population, COSTS), np.random.default_rng(0)
    risks = np.append(everything.risk(risk), 0.0)  # the last for nobody who leaves early
    found = []
    for _ in range(200):
        drawn = everything.images(torch.from_numpy(generator.integers(len(population), size=300)))
        found.append(risks[certified(drawn, demand)[0] - 1])
    assert 0.02 < np.mean(found) <= 0.03 + 3 * np.std(found) / math.sqrt(200)


# What is tested


def test_the_sequence_is_that_of_mapie(population, front):
    mapie = pytest.importorskip("mapie.risk_control")
    passed = []
    for seed in range(20):
        part = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))[:300]
        outcomes = Outcomes.of(front[::-1], population.part(part), COSTS)
        for demand in (Demand("harm", 0.03, 0.1), Demand("drop", 0.02, 0.1), Demand("error", 0.2)):
            p_values = evidence(outcomes, demand.risk, demand.bound, demand.delta).p_values
            expected = mapie.control_fwer(p_values, demand.delta, mapie.FWERFixedSequenceTesting())
            assert certified(outcomes, demand)[0] == len(expected)
            passed.append(len(expected))
    assert len(set(passed)) > 5


def test_conformal_control_by_hand(population, front):
    outcomes = Outcomes.of(front[::-1], population.part(torch.arange(200)), COSTS)
    worst, expected = torch.zeros(200), 0
    for row in range(len(front)):
        worst = torch.maximum(worst, outcomes.lost[row].float())
        if (worst.sum() + 1) / 201 > 0.04:
            break
        expected = row + 1
    assert 0 < expected < len(front)
    assert certified(outcomes, Demand("harm", 0.04, method="crc"))[0] == expected
    assert certified(outcomes, Demand("drop", 0.04, method="crc"))[0] == expected


def test_the_last_certified_policy_is_taken_and_described(population, front):
    testing = population.part(torch.arange(1000, 3000))
    demand = Demand("drop", 0.01, 0.05)
    path = path_from(front, population.part(torch.arange(1000)), COSTS, demand)
    policy, found = certify(path, testing, COSTS, demand)
    passed, numbers = certified(Outcomes.of(path, testing, COSTS), demand)
    assert (policy, found) == certify([never_early(path[0]), *path], testing, COSTS, demand)
    assert policy == path[passed - 1] and found.feasible and found.p_value == numbers.p_values[passed - 1]
    drop = testing.full_correct.double().mean().item() - policy.simulate(testing, COSTS).accuracy
    assert found.observed == pytest.approx(drop) and found.p_value <= 0.05 and found.images == 2000
    what = "accuracy on new images is at most 1 percentage point below the full network's"
    assert found.statement == f"With 95 % confidence, {what}."
    assert "2000 calibration images that tested the policy and did nothing else" in found.assumption
    assert found.limit.startswith("2000 images certify no drop below 0.2")
    assert Guarantee(**json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_guarantee_of_every_kind(population, front, risk, method):
    if (risk, method) == ("error", "crc"):
        return  # is refused
    a, b = split_calibration(2000)
    demand = Demand(risk, 0.6 if risk == "cost" else 0.1, method=method)
    policy, found = guaranteed(front, population.part(a), population.part(b), COSTS, demand)
    assert found.feasible and found.observed <= demand.bound and policy.thresholds[0] < NOBODY
    assert found.statement.startswith("With 95 %" if method == "ltt" else "On average over draws")
    assert (found.delta, found.p_value is None) == ((0.05, False) if method == "ltt" else (None, True))
    json.dumps(asdict(found), allow_nan=False)


# Where nothing can be guaranteed


@pytest.mark.parametrize("risk", ["drop", "harm", "disagreement"])
def test_the_images_that_a_bound_takes_are_the_least(risk):
    for demand in (Demand(risk, 0.05), Demand(risk, 0.05, method="crc")):
        n = images_for(demand)
        assert smallest_bound(n, demand) <= 0.05 < smallest_bound(n - 1, demand)


def test_too_few_images_mean_that_nobody_leaves_early(population, front):
    few, demand = population.part(torch.arange(1000, 1100)), Demand("harm", 0.01)
    policy, found = guaranteed(front, population.part(torch.arange(1000)), few, COSTS, demand)
    assert policy.thresholds == (NOBODY, NOBODY, EVERYBODY) and policy.off == (0, 1)
    assert not found.feasible and found.smallest_bound == pytest.approx(1 - 0.05 ** (1 / 100))
    assert found.statement == (
        "No guarantee of harm at most 1 %, so no image exits early. 100 images certify no harm below 2.95 %, "
        "even if all of them are answered as by the full network. 1 % takes 299 or more."
    )
    assert 0.99**299 <= 0.05 < 0.99**298


def test_a_risk_that_every_policy_has_means_that_nobody_leaves_early(population, front):
    greedy = [Policy((0.3, 0.3, EVERYBODY), "max_prob", macs=1.0)]
    policy, found = certify(greedy, population, COSTS, Demand("harm", 0.01))
    assert not found.feasible and found.observed > 0.01 and policy.off == (0, 1) and policy.macs is None
    assert found.statement.endswith("do not show it of even the safest policy that was found.")
    policy, found = guaranteed(greedy, population, population, COSTS, Demand("error", 0.01))
    assert not found.feasible and policy.off == (0, 1) and (found.observed, found.p_value) == (0, None)
    assert found.statement.endswith("so no image exits early. The images that find policies show it of none.")
    policy, found = certify(greedy, population, COSTS, Demand("cost", 0.2))
    assert not found.feasible and "certify no cost below 25" in found.statement


def test_never_early_reads_the_last_exits_own_answer(population):
    greedy = Policy((3.0, 3.0, EVERYBODY), "agreement", answer="mean", temperatures=(1.0, 2.0, 1.0))
    policy, found = certify([greedy], population, COSTS, Demand("cost", 0.01))
    assert not found.feasible and (policy.answer, policy.confidence) == ("exit", "max_prob")
    assert policy.off == (0, 1) and policy.temperatures == greedy.temperatures


@pytest.mark.parametrize("risk", [risk for risk in RISKS if risk != "cost"])
def test_the_smallest_bound_is_the_smallest(population, risk):
    """Without a loss among them, images certify it and nothing below."""
    all_right = replace(
        population, correct=torch.ones_like(population.correct), full=population.targets.int()
    )
    all_right = replace(all_right, answers=all_right.full.expand(3, -1)).part(torch.arange(200))
    path = [Policy((-0.0, NOBODY, EVERYBODY))]
    for method in METHODS if risk != "error" else ["ltt"]:
        least = smallest_bound(200, Demand(risk, 0.5, 0.1, method))
        assert certify(path, all_right, COSTS, Demand(risk, 1.0001 * least, 0.1, method))[1].feasible
        assert not certify(path, all_right, COSTS, Demand(risk, 0.9999 * least, 0.1, method))[1].feasible


# Paths


def test_a_path_goes_from_safe_to_greedy(population, front):
    outcomes = Outcomes.of(front, population, COSTS)
    cost = outcomes.risk("cost")
    rows = path_rows(outcomes, Demand("harm", 0.03, method="crc"))
    assert (np.diff(cost[rows]) <= -0.01).all() and cost[rows[0]] == cost.max()
    assert cost.min() <= cost[rows[-1]] < cost.min() + 0.01
    dear = path_rows(outcomes, Demand("cost", 0.6))
    assert (np.diff(cost[dear]) >= 0.01).all() and cost[dear[0]] == cost.min()
    error = Demand("error", 0.1)
    rows = path_rows(outcomes, error)
    p_values = evidence(outcomes, "error", 0.1, 0.05).p_values
    assert len(rows) > 0 and p_values[rows[0]] == p_values[rows].min()
    assert path_rows(Outcomes.of(front, population, [4.0, 4.0, 4.0]), error) == []  # nothing is saved


def test_exits_that_cannot_be_certified_are_switched_off(population):
    policy = Policy((0.999, 0.3, EVERYBODY), accuracy=0.5)
    sure = Policy((0.99, NOBODY, EVERYBODY))
    outcomes = Outcomes.of([policy, sure], population, COSTS)
    left, wrong = outcomes.errors()
    assert (wrong[0] / left[0] <= 0.1).tolist() == [True, False]
    kept = without_unsure_exits(outcomes, Demand("error", 0.1))
    assert kept == [Policy((0.999, NOBODY, EVERYBODY), off=(1,)), sure]
    assert without_unsure_exits(outcomes, Demand("error", 1e-4)) == []


def test_halves_of_calibration_images_share_none():
    a, b = split_calibration(101, seed=3)
    assert sorted(a.tolist() + b.tolist()) == list(range(101)) and (len(a), len(b)) == (50, 51)
    again, other = split_calibration(101, seed=3)[0], split_calibration(101, seed=4)[0]
    assert torch.equal(a, again) and not torch.equal(a, other)
    with pytest.raises(ValueError, match="^1 calibration images: a guarantee needs some to find policies"):
        split_calibration(1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("lag", 0.1), "unknown risk 'lag'; accepted: drop, harm, disagreement, error, cost"),
        (("drop", 0.1, 0.1, "rcps"), "unknown method 'rcps'; accepted: ltt, crc"),
        (("drop", 0), "bound 0 of a guarantee; accepted: numbers above 0 and below 1"),
        (("drop", 0.1, 1), "delta 1 of a guarantee; accepted: numbers above 0 and below 1"),
        (("drop", 0.1, float("nan")), "delta nan of a guarantee; accepted"),
        (("error", 0.1, 0.1, "crc"), "crc cannot bound the error at an exit"),
    ],
)
def test_what_cannot_be_demanded(words, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        Demand(*words)


def test_a_guarantee_needs_policies(population):
    with pytest.raises(ValueError, match="^a guarantee needs policies to test$"):
        guaranteed([], population, population, COSTS, Demand("drop", 0.1))
