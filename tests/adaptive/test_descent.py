import torch

from adaptive.costs import StageCosts
from adaptive.descent import Tables, descend, line
from adaptive.grids import Prices, edges, grid_front, outcomes
from adaptive.thresholds import EVERYBODY, NOBODY


def tables(exits, samples, seed=0):
    """Harder samples need later exits, and the more confident an exit is, the likelier it is right.

    The values are these probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    skill, hard = torch.linspace(0, 2, exits)[:, None], 2 * torch.randn(samples, generator=generator)
    latent = skill - hard + torch.randn(exits, samples, generator=generator)
    before = tuple(tuple(range(k)) for k in range(exits))
    costs = StageCosts((1.0,) * exits, (0.2,) * exits, before, (False,) * exits)
    return Tables(latent.sigmoid(), latent.sigmoid().double(), Prices(costs))


def test_a_line_is_what_each_threshold_does():
    case = tables(4, 60)
    limits = edges(case.confidence[1].sort().values, 9)
    ordered, order = case.confidence[1].sort()
    settings = torch.tensor([[0.9, 0.5, 0.7, EVERYBODY], [NOBODY, 0.5, NOBODY, EVERYBODY]]).double()
    accuracy, cost = line(case, 1, settings, order, torch.searchsorted(ordered, limits))
    for j, limit in enumerate([EVERYBODY, *limits.tolist(), NOBODY]):
        settings[:, 1] = limit
        right, paid = outcomes(case.confidence, case.values, settings, case.prices)
        torch.testing.assert_close(accuracy[:, j], right)
        torch.testing.assert_close(cost[:, j], paid)


def test_descent_is_as_good_as_the_exact_search():
    case = tables(4, 300)
    exact = grid_front(case.confidence, case.values, case.prices, {1: 40, 2: 40, 3: 40})
    starts = [
        grid_front(case.confidence, case.values, case.prices, grid) for grid in ({1: 20}, {1: 20, 2: 9})
    ]
    found = descend(case, starts)
    budgets = torch.linspace(1.3, 4, 28, dtype=torch.float64)
    lost = exact.accuracy[exact.within(budgets)] - found.accuracy[found.within(budgets)]
    assert lost.max() < 0.004 and lost.mean() <= 0
    gained = found.accuracy[found.within(budgets)] - starts[1].accuracy[starts[1].within(budgets)]
    assert gained.min() >= 0 and gained.mean() > 0.001


def test_settings_do_what_descent_says():
    case = tables(7, 200, seed=1)
    found = descend(case, [grid_front(case.confidence, case.values, case.prices, {1: 9, 2: 5})])
    accuracy, cost = outcomes(case.confidence, case.values, found.thresholds, case.prices)
    torch.testing.assert_close(accuracy, found.accuracy)
    torch.testing.assert_close(cost, found.cost)
    assert (found.cost.diff() > 0).all() and (found.accuracy.diff() > 0).all()
