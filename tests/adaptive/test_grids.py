from itertools import product

import pytest
import torch

from adaptive.costs import StageCosts
from adaptive.grids import Front, Prices, best, box_sums, edges, grid_front, outcomes, places, subsets
from adaptive.thresholds import EVERYBODY, NOBODY, exit_of


def chain(trunks, heads):
    before = tuple(tuple(range(k)) for k in range(len(trunks)))
    return StageCosts(tuple(trunks), tuple(heads), before, (False,) * len(trunks))


def random_case(generator, exits, samples, levels):
    """Confidences with ties, answers, and costs."""
    confidence = torch.randint(levels, (exits, samples), generator=generator) / levels
    correct = torch.rand(exits, samples, generator=generator) < 0.6
    trunks, heads = (10 * torch.rand(2, exits, generator=generator) + 0.1).tolist()
    return confidence, correct, chain(trunks, heads)


def by_brute_force(confidence, correct, costs, switch_off=True):
    """(cost, accuracy) of all that is not beaten, trying every threshold and nobody at every exit."""
    choices = [[EVERYBODY, *row.unique().tolist(), NOBODY] for row in confidence[:-1]]
    settings = [[*limits, EVERYBODY] for limits in product(*choices)]
    exits = (confidence >= torch.tensor(settings)[:, :, None]).byte().argmax(1)  # [P, N]
    right = correct.gather(0, exits).double().mean(1).tolist()
    off = [{k for k, one in enumerate(limits) if one == NOBODY and switch_off} for limits in settings]
    leaving = torch.tensor([costs.leaving(one) for one in off], dtype=torch.float64)
    paid = leaving.gather(1, exits).mean(1).tolist()
    rounded = [round(one, 9) for one in paid]  # equal costs are summed in another order
    found = sorted(zip(rounded, right, strict=True), key=lambda point: (point[0], -point[1]))
    front = []
    for cost, accuracy in found:
        if not front or accuracy > front[-1][1] + 1e-9:
            front.append((cost, accuracy))
    return torch.tensor(front, dtype=torch.float64).T


@pytest.mark.parametrize("switch_off", [True, False])
def test_a_grid_of_all_values_finds_what_brute_force_finds(switch_off):
    generator = torch.Generator().manual_seed(0)
    for case in range(100):  # in each of two ways
        exits = 2 + case % 3
        confidence, correct, costs = random_case(generator, exits, 7 - exits, 5)
        prices = Prices(costs, switch_off)
        front = grid_front(confidence, correct.double(), prices, {1: 9, 2: 9, 3: 9})
        cost, accuracy = by_brute_force(confidence, correct, costs, switch_off)
        torch.testing.assert_close(front.accuracy, accuracy)
        torch.testing.assert_close(front.cost, cost)


def test_a_front_is_what_its_thresholds_do():
    confidence, correct, costs = random_case(torch.Generator().manual_seed(1), 5, 400, 1000)
    prices = Prices(costs)
    front = grid_front(confidence, correct.double(), prices)
    accuracy, cost = outcomes(confidence, correct, front.thresholds, prices)
    torch.testing.assert_close(accuracy, front.accuracy)
    torch.testing.assert_close(cost, front.cost)
    assert (front.cost.diff() > 0).all() and (front.accuracy.diff() > 0).all()
    assert front.thresholds[:, -1].eq(EVERYBODY).all()


def test_leaving_agrees_with_the_one_rule_of_thresholds():
    confidence = torch.rand(4, 50, generator=torch.Generator().manual_seed(2))
    limits = torch.rand(20, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.stack([exit_of(confidence, row) for row in limits.float()])
    assert places(confidence, limits).equal(expected)


def test_boxes_of_a_case_by_hand():
    # Exit 0 is right for sample 0, exit 1 for both; 3 and 5 are their costs.
    cell, values = [torch.tensor([1, 0])], torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
    accuracy, cost = box_sums(cell, [2], values, [3, 5])
    assert accuracy.tolist() == [0.5, 1] and cost.tolist() == [3, 4]  # nobody goes on; sample 1 does


def test_the_best_of_many_settings():
    generator = torch.Generator().manual_seed(4)
    cost = torch.randint(3000, (20_000,), generator=generator).double()  # more than there are buckets
    accuracy = (cost / 3000) ** 0.5 + torch.randint(9, (20_000,), generator=generator) / 10
    expected, highest = [], -1.0
    for i in sorted(range(len(cost)), key=lambda i: (cost[i].item(), -accuracy[i].item())):
        if accuracy[i] > highest:
            expected, highest = [*expected, i], accuracy[i].item()
    rows = best(cost, accuracy)
    assert cost[rows].equal(cost[expected]) and accuracy[rows].equal(accuracy[expected])
    assert best(torch.ones(3), torch.tensor([0.1, 0.3, 0.3])).tolist() == [1]


def test_a_budget_between_settings_buys_the_cheaper_one():
    front = Front(torch.zeros(3, 2), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]).double())
    assert front.within(torch.tensor([0.5, 1.0, 1.9, 2.0, 9.0]).double()).tolist() == [0, 0, 0, 1, 2]


def test_edges_are_values_denser_at_the_low_end():
    assert edges(torch.tensor([0.1, 0.1, 0.4]), 3).tolist() == pytest.approx([0.1, 0.4])
    assert edges(torch.arange(100.0), 4).tolist() == [0, 6, 25, 56]


def test_sets_of_exits_hold_the_last_one():
    assert list(subsets(3, 1)) == [(2,), (0, 2), (1, 2)]


def test_an_exit_that_is_no_better_is_switched_off():
    confidence = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])
    correct = torch.tensor([[True, False], [True, False], [True, True]])
    front = grid_front(confidence, correct.double(), Prices(chain([1, 1, 1], [1, 1, 1])))
    assert front.thresholds[-1].tolist() == pytest.approx([0.9, NOBODY, EVERYBODY])
    assert front.cost.tolist() == [2, 3.5] and front.accuracy.tolist() == [0.5, 1]  # 2 or 1 + 1 + 1 + 2 heads
