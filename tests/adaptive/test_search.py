import math
from dataclasses import replace

import pytest
import torch

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.grids import Front, Prices, outcomes
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.search import POLICIES, coarse, expected, find, search, search_front, thin
from adaptive.thresholds import MSDNET_RATIOS, NOBODY, geometric_quotas, quota_thresholds


def costs_of(exits, head=0.2):
    before = tuple(tuple(range(k)) for k in range(exits))
    return StageCosts((1.0,) * exits, (head,) * exits, before, (False,) * exits)


def sample(exits, samples, seed=0):
    """Confidence and correct: later exits are better, but the second one is no better than the first."""
    generator = torch.Generator().manual_seed(seed)
    skill, hard = torch.linspace(0, 2, exits), 2 * torch.randn(samples, generator=generator)
    skill[1] = -0.5
    latent = skill[:, None] - hard + 0.7 * torch.randn(exits, samples, generator=generator)
    correct = torch.rand(exits, samples, generator=generator) < (2 * latent).sigmoid()
    return latent.sigmoid(), correct


def logits_of(exits, samples, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    noise = torch.randn(exits, samples, classes, generator=generator)
    hints = torch.nn.functional.one_hot(targets, classes) * torch.linspace(1, 3, exits)[:, None, None]
    return list(noise + hints), targets


@pytest.fixture(scope="module")
def found():
    confidence, correct = sample(4, 4000)
    return *search(confidence, correct, Prices(costs_of(4))), Prices(costs_of(4))


def test_held_out_it_beats_the_quota_rule(found):
    front, _, prices = found
    confidence, correct = sample(4, 4000)
    test = sample(4, 40_000, seed=1)
    quotas = [geometric_quotas(ratio, 4) for ratio in MSDNET_RATIOS]
    limits = torch.stack([quota_thresholds(confidence, one) for one in quotas]).double()
    rules = find_rules(confidence, correct, limits, prices)
    for budget in (1.5, 2.0, 2.5, 3.0):
        ours = front.thresholds[front.within(torch.tensor([budget]).double())]
        theirs = limits[[rules(budget)]]
        (right, quota), _ = outcomes(*test, torch.cat([ours, theirs]), prices)
        assert right > quota + 0.003, budget


def find_rules(confidence, correct, limits, prices):
    """The best of these thresholds within a budget, on the samples that they were found on."""
    accuracy, cost = outcomes(confidence, correct, limits, prices)
    return lambda budget: accuracy.masked_fill(cost > budget, 0).argmax().item()


def test_the_accuracy_expected_is_that_on_other_samples(found):
    front, hoped, prices = found
    accuracy, cost = outcomes(*sample(4, 40_000, seed=2), front.thresholds, prices)
    assert (hoped - accuracy).abs().max() < 0.015  # twice the standard error of 4,000 samples
    torch.testing.assert_close(cost, front.cost, rtol=0.03, atol=0)


def test_a_useless_exit_is_switched_off(found):
    front, _, _ = found
    assert (front.thresholds[5:, 1] == NOBODY).double().mean() > 0.8


def test_chance_is_not_rewarded():
    """Where confidence says nothing and all exits are equally good, no policy is expected to be better."""
    found, plain = [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        confidence, chance = torch.rand(2, 3, 150, generator=generator)
        found.append(search(confidence, chance < 0.7, Prices(costs_of(3)))[1][-1])
        plain.append(find(confidence, (chance < 0.7).double(), Prices(costs_of(3))).accuracy[-1])
    assert sum(plain) / 6 > 0.75 and sum(found) / 6 < 0.73


def test_policies_say_what_they_do():
    tables = ExitTables.of(*logits_of(3, 600))
    policies = search_front(tables, costs_of(3), Reading())
    assert 3 < len(policies) <= POLICIES
    for one in policies:
        point = one.simulate(tables, costs_of(3))
        assert (point.macs, point.shares) == (pytest.approx(one.macs), pytest.approx(one.shares))
        assert one.name == "search" and one.off == tuple(
            k for k, limit in enumerate(one.thresholds) if limit == NOBODY
        )
        assert abs(point.accuracy - one.accuracy) < 0.04
    assert [one.macs for one in policies] == sorted({one.macs for one in policies})
    assert [one.accuracy for one in policies] == sorted(one.accuracy for one in policies)
    assert policies == search_front(tables, costs_of(3), Reading())


@pytest.mark.parametrize("reading", [Reading(answer="best"), Reading(answer="mean"), Reading("agreement")])
def test_no_exit_is_off_that_later_ones_remember(reading, tmp_path):
    policies = search_front(ExitTables.of(*logits_of(3, 200), reading), costs_of(3), reading)
    assert len(policies) > 1 and not any(one.off for one in policies)
    policies[-1].save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policies[-1]
    dearest = ExitTables.of(*logits_of(3, 200), reading)
    assert policies[-1].simulate(dearest, costs_of(3)).macs == pytest.approx(policies[-1].macs)


@pytest.mark.parametrize(("exits", "samples"), [(1, 9), (2, 1), (3, 2), (6, 30)])
def test_few_samples_and_many_exits(exits, samples):
    tables = ExitTables.of(*logits_of(exits, samples))
    policies = search_front(tables, costs_of(exits), Reading())
    assert policies and all(0 <= one.accuracy <= 1 for one in policies)
    assert policies[0].macs == pytest.approx(1.2)


def test_more_exits_have_fewer_thresholds_at_once():
    assert [max(coarse(exits)) for exits in (5, 8, 12, 30)] == [4, 4, 2, 1]
    sets = [sum(math.comb(exits - 1, n) for n in coarse(exits)) for exits in (8, 12)]
    assert sets == [98, 66]


def test_thin_keeps_both_ends_and_the_best_of_each_step(found):
    front, _, _ = found
    few = thin(front, 10)
    assert len(few) <= 10
    assert few.cost[0] == front.cost[0] and few.cost[-1] == front.cost[-1]
    assert torch.isin(few.cost, front.cost).all()
    assert len(thin(front, 10_000)) == len(front)


def test_expected_accuracies_have_the_level_and_the_slope_of_those_left_out():
    front = Front(torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.4, 0.5]), torch.arange(4.0))
    assert expected(front, front.accuracy / 2 + 0.1).tolist() == pytest.approx([0.15, 0.2, 0.3, 0.35])
    assert expected(front, torch.tensor([0.4, 0.3, 0.2, 0.1])).tolist() == pytest.approx([0.25] * 4)
    assert expected(front, 1.5 * front.accuracy).tolist() == pytest.approx([0.25, 0.35, 0.55, 0.65])
    steep = replace(front, accuracy=torch.tensor([0.0, 0.9, 0.95, 1.0], dtype=torch.float64))
    assert expected(steep, torch.tensor([0.1, 1.0, 1.0, 1.0], dtype=torch.float64)).max() == 1  # of a line
