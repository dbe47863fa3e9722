from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial

from adaptive.costs import StageCosts
from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.risks import Outcomes, difference, evidence, exit_p_values, hoeffding_bentkus
from adaptive.thresholds import EVERYBODY, NOBODY

# P-values


@pytest.mark.parametrize("bound", [0.005, 0.1, 0.6])
@pytest.mark.parametrize("binary", [True, False])
def test_p_values_of_a_mean_are_those_of_mapie(bound, binary):
    mapie = pytest.importorskip("mapie.risk_control.methods")
    n, counts = 512, np.arange(0, 512, 3)  # of which the shares are exact
    expected = mapie.compute_hoeffding_bentkus_p_value(counts / n, n, bound, binary)[:, 0]
    found = hoeffding_bentkus(counts, n, bound, binary=binary)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)


def test_p_values_of_losses_of_0_and_1_are_the_binomial_tail():
    found = hoeffding_bentkus(np.array([0, 51, 52, 2500]), 2500, 0.02, binary=True)
    np.testing.assert_allclose(found, binom.cdf([0, 51, 52, 2500], 2500, 0.02), rtol=1e-9)
    rounded = 2500 * (51 / 2500)
    assert rounded > 51 and hoeffding_bentkus(rounded, 2500, 0.02, binary=True) == found[1]
    # A sum that should be 0 may be a little below.
    below, none = hoeffding_bentkus([-1e-13, 0.0], 2500, 0.02, binary=False)
    assert below == pytest.approx(none)


def test_without_losses_or_with_an_impossible_bound_a_p_value_is_known():
    assert hoeffding_bentkus(0, 0, 0.1, binary=True) == 1
    assert hoeffding_bentkus([3.0, 4.0], 9, -0.1, binary=False).tolist() == [1, 1]
    assert hoeffding_bentkus([3.0, 4.0], 9, 1.1, binary=False).tolist() == [0, 0]


def chances(n, losses, gains):
    """Every (lost, gained) of n images, and its chance."""
    pairs = np.array([(i, j) for i in range(n + 1) for j in range(n + 1 - i)])
    rest = n - pairs.sum(1, keepdims=True)
    return pairs, multinomial.pmf(np.hstack([pairs, rest]), n, [losses, gains, 1 - losses - gains])


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_a_difference_is_certified_no_more_often_than_delta_whatever_else_holds(bound):
    delta, sizes = 0.1, []
    for above in (0, 0.05):
        for either in np.linspace(bound + above, 1, 8):
            net = bound + above
            pairs, chance = chances(24, (either + net) / 2, (either - net) / 2)
            passes = difference(*pairs.T, 24, bound, delta) <= delta
            sizes.append(chance[passes].sum())
    assert max(sizes) <= delta
    assert bound == 0.05 or max(sizes) > 0.02  # it is not just always refused


def test_the_p_value_of_a_difference_is_the_tail_at_the_limit_of_changed_answers():
    n, lost, gained, bound, delta = 24, 1, 3, 0.25, 0.1
    grid = np.linspace(0.2, 0.6, 40_001)
    limit = grid[binom.cdf(lost + gained, n, grid) > 0.01].max()
    pairs, chance = chances(n, (limit + bound) / 2, (limit - bound) / 2)
    expected = chance[pairs[:, 0] - pairs[:, 1] <= lost - gained].sum() + 0.01
    assert difference(lost, gained, n, bound, delta) == pytest.approx(expected, abs=1e-5)


def test_p_values_of_a_difference_follow_what_is_lost_and_gained():
    found = difference(np.arange(20), 10, 1000, 0.01, 0.05)
    assert (np.diff(found) >= 0).all() and found[0] < 0.02 and found[-1] == 1
    assert difference(0, 600, 1000, 0.01, 0.05) == 1  # more changes than the proof covers


# Outcomes


def hand_made():
    """Two exits and the last; confidences so that images leave where they do; 4 images."""
    answers = torch.tensor([[1, 2, 1, 0], [1, 1, 0, 0], [1, 1, 0, 2]], dtype=torch.int32)
    targets = torch.tensor([1, 1, 1, 0])
    blank = torch.zeros(3, 4)
    confidence = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.9, 0.9, 0.6], [1.0] * 4])
    correct = answers == targets
    return ExitTables(confidence, correct, correct, blank, answers, blank[None], targets, answers[-1])


def test_outcomes_of_policies_by_hand():
    policies = [Policy((NOBODY, NOBODY, EVERYBODY)), Policy((0.7, 0.5, EVERYBODY))]
    outcomes = Outcomes.of(policies, hand_made(), [1.0, 2.0, 4.0])
    assert outcomes.exits.tolist() == [[2, 2, 2, 2], [0, 0, 0, 1]]
    assert outcomes.cost.tolist() == [[1, 1, 1, 1], [0.25, 0.25, 0.25, 0.5]]
    assert outcomes.lost.sum(1).tolist() == [0, 1]  # image 1
    assert outcomes.gained.sum(1).tolist() == [0, 2]  # images 2 and 3
    assert outcomes.differs.sum(1).tolist() == [0, 3]
    assert outcomes.risk("drop").tolist() == [0, -0.25] and outcomes.risk("harm").tolist() == [0, 0.25]
    assert outcomes.risk("disagreement").tolist() == [0, 0.75]
    assert outcomes.risk("error").tolist() == [0, 1 / 3] and outcomes.risk("cost").tolist() == [1, 0.3125]
    assert [column.tolist() for column in outcomes.errors()] == [[[0, 0], [3, 1]], [[0, 0], [1, 0]]]
    first = outcomes.rows([1]).images(torch.tensor([0, 0, 1]))
    assert first.policies == (policies[1],) and first.risk("harm").tolist() == [1 / 3] and len(first) == 3


def test_costs_of_stages_count_what_is_switched_off():
    costs = StageCosts((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), ((), (0,), (0, 1)), (False,) * 3)
    on, off = Policy((NOBODY, 0.5, EVERYBODY)), Policy((NOBODY, 0.5, EVERYBODY), off=(0,))
    outcomes = Outcomes.of([on, off], hand_made(), costs)
    assert outcomes.risk("cost").tolist() == [1, 0.75]  # all leave at the second exit; alone the last costs 4
    assert (outcomes.lowest, outcomes.highest) == (0.75, 1.5)


def test_the_error_must_be_small_at_every_exit_that_is_used():
    tables = hand_made()
    some = Outcomes.of([Policy((0.7, NOBODY, EVERYBODY)), Policy((0.7, 0.95, EVERYBODY))], tables, [1, 2, 4])
    p_values = exit_p_values(some, 0.5)
    assert p_values[0].tolist() == [pytest.approx(binom.cdf(1, 3, 0.5)), 0]  # the second exit is not used
    assert p_values[1, 1] == 1  # it is, but nobody leaves there
    assert evidence(some, "error", 0.5, 0.05).p_values.tolist() == p_values.max(1).tolist()


def test_the_cost_is_tested_on_the_scale_of_possible_costs():
    tables = hand_made().part(torch.arange(400) % 4)
    outcomes = Outcomes.of([Policy((0.7, 0.5, EVERYBODY))], tables, [2.0, 2.5, 4.0])
    assert (outcomes.lowest, outcomes.highest) == (0.5, 1)
    found = evidence(outcomes, "cost", 0.6, 0.05)
    # Costs of 0.5 and 0.625 are losses of 0 and 0.25 against a bound of 0.2.
    assert found.observed == pytest.approx(0.53125)
    assert found.p_values == pytest.approx(hoeffding_bentkus(25.0, 400, 0.2, binary=False))


@pytest.mark.parametrize("cheapest", [0.1, 0.3, 0.7])
def test_rounding_a_mean_of_equal_costs_leaves_its_p_value_a_number(cheapest):
    tables = hand_made().part(torch.arange(407) % 4)
    policies = [Policy((EVERYBODY, 0.5, EVERYBODY)), Policy((NOBODY, NOBODY, EVERYBODY))]
    outcomes = Outcomes.of(policies, tables, [cheapest, 0.9, 1.1])
    p_values = evidence(outcomes, "cost", 0.8, 0.05).p_values
    assert p_values[0] < 1e-9 and p_values[1] == 1


def test_agreement_and_mean_answers_are_compared_with_the_last_exits_own():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 50, 4), torch.randint(4, (50,))
    policy = Policy((2.0, 2.0, EVERYBODY), "agreement", answer="mean")
    tables = ExitTables.of(list(logits), targets, policy.reading)
    outcomes = Outcomes.of([policy], tables, [1, 2, 3])
    answers = torch.stack([read.answers.argmax(-1) for read in policy.reading.read_all(logits)])
    given = answers.gather(0, outcomes.exits)
    assert torch.equal(outcomes.differs, given != logits[-1].argmax(-1))
    drop = (logits[-1].argmax(-1) == targets).double().mean() - (given == targets).double().mean()
    assert outcomes.risk("drop") == pytest.approx(drop.item())


def test_a_single_exit_has_nothing_to_risk():
    tables = hand_made().of_exits([2])
    with pytest.raises(ValueError, match="^a network with one exit: there is no early exit"):
        Outcomes.of([Policy((EVERYBODY,))], replace(tables), [1.0])
