import numpy as np
import pytest
import torch

from adaptive.thresholds import (
    DYN_PERCEIVER_RATIOS,
    EVERYBODY,
    MSDNET_RATIOS,
    NOBODY,
    WIDE_RATIOS,
    cheapest,
    exit_of,
    geometric_quotas,
    quota_thresholds,
    simulate,
    within_budget,
)


def thresholds_by_walking(confidence, quotas):
    """The papers' rule, sample by sample."""
    num_exits, num_samples = confidence.shape
    thresholds = [NOBODY] * (num_exits - 1) + [EVERYBODY]
    gone = set()
    for k in range(num_exits - 1):
        wanted, met = int(np.float32(num_samples) * np.float32(quotas[k])), 0
        for i in sorted(range(num_samples), key=lambda i: -confidence[k, i]):
            if i not in gone:
                met += 1
                if met == wanted:
                    thresholds[k] = confidence[k, i].item()
                    break
        gone |= {i for i in range(num_samples) if confidence[k, i] >= thresholds[k]}
    return thresholds


def exits_by_walking(confidence, thresholds):
    num_exits, num_samples = confidence.shape
    last = num_exits - 1
    return [
        next((k for k in range(last) if confidence[k, i] >= thresholds[k]), last) for i in range(num_samples)
    ]


@pytest.mark.parametrize("levels", [3, 20, 10**6])
@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_walking_through_the_samples(seed, levels):
    rng = np.random.RandomState(seed)
    num_exits, num_samples = rng.randint(1, 7), rng.randint(1, 60)
    # Few levels make ties; quotas may be zero, or more than what is left.
    confidence = torch.from_numpy(rng.randint(0, levels, (num_exits, num_samples)) / levels).float()
    quotas = torch.from_numpy(rng.dirichlet(np.full(num_exits, 0.5))).float()
    thresholds = quota_thresholds(confidence, quotas)
    assert torch.equal(thresholds, torch.tensor(thresholds_by_walking(confidence, quotas)))
    assert exit_of(confidence, thresholds).tolist() == exits_by_walking(confidence, thresholds)


def test_quotas_are_met_by_the_surest_of_those_still_there():
    confidence = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3], [0.99, 0.4, 0.98, 0.6, 0.5], [0.0] * 5])
    thresholds = quota_thresholds(confidence, torch.tensor([0.4, 0.2, 0.4]))
    assert torch.equal(thresholds, torch.tensor([0.8, 0.6, EVERYBODY]))
    assert exit_of(confidence, thresholds).tolist() == [0, 2, 0, 1, 2]


def test_nobody_leaves_at_an_exit_without_a_quota():
    confidence = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.0] * 4])
    assert quota_thresholds(confidence, torch.tensor([0.0, 0.5, 0.5])).tolist() == [
        NOBODY,
        pytest.approx(0.8),
        EVERYBODY,
    ]


def test_a_quota_below_one_sample_is_none():
    confidence = torch.tensor([[0.9, 0.8, 0.7], [0.0] * 3])
    assert quota_thresholds(confidence, torch.tensor([0.33, 0.67])).tolist() == [NOBODY, EVERYBODY]


def test_quotas_are_counted_in_float32():
    # 10 times the float32 nearest to 0.7 is 6.9999999 exactly, and 7 when rounded to float32.
    confidence = torch.stack([torch.arange(10) / 10, torch.zeros(10)])
    thresholds = quota_thresholds(confidence, torch.tensor([0.7, 0.3]))
    assert exit_of(confidence, thresholds).tolist() == [1] * 3 + [0] * 7


def test_nobody_leaves_where_the_quota_exceeds_what_is_left():
    # All four tie at exit 0 and leave together, although half of them were meant to stay.
    confidence = torch.tensor([[0.5] * 4, [0.9, 0.8, 0.7, 0.6], [0.0] * 4])
    thresholds = quota_thresholds(confidence, torch.tensor([0.5, 0.25, 0.25]))
    assert thresholds.tolist() == [0.5, NOBODY, EVERYBODY]
    assert exit_of(confidence, thresholds).tolist() == [0, 0, 0, 0]


def test_everybody_that_is_left_may_leave():
    confidence = torch.tensor([[0.25, 0.5], [0.0, 0.0]])
    assert quota_thresholds(confidence, torch.tensor([1.0, 0.0])).tolist() == [0.25, EVERYBODY]


def test_the_last_exit_takes_everybody_whatever_its_threshold():
    confidence = torch.tensor([[0.1, 0.9], [0.1, 0.1]])
    assert exit_of(confidence, torch.tensor([0.5, NOBODY])).tolist() == [1, 0]


def test_thresholds_keep_the_type_and_leave_the_table_alone():
    confidence = torch.tensor([[0.1, 0.9], [0.3, 0.2]], dtype=torch.float64)
    before = confidence.clone()
    assert quota_thresholds(confidence, torch.tensor([0.5, 0.5])).dtype == torch.float64
    exit_of(confidence, torch.tensor([0.5, 0.0]))
    assert torch.equal(confidence, before)


def test_geometric_quotas():
    assert geometric_quotas(0.5, 3).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert geometric_quotas(2.0, 3).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert geometric_quotas(1.0, 4).tolist() == pytest.approx([0.25] * 4)
    assert geometric_quotas(0.75, 5).tolist() == pytest.approx(
        [0.3278, 0.2458, 0.1844, 0.1383, 0.1037], abs=5e-5
    )
    assert geometric_quotas(0.3, 1).tolist() == [1.0]
    assert geometric_quotas(0.5, 3).dtype == torch.float32


def test_scaled_quotas_leave_the_rest_to_the_later_exits():
    # 1/3 halves to 1/6, and the others share 5/6; without the second quota, all that is left goes to the
    # last.
    assert geometric_quotas(1.0, 3, (0.5, 1)).tolist() == pytest.approx([1 / 6, 5 / 12, 5 / 12])
    assert geometric_quotas(1.0, 3, [1, 0]).tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert geometric_quotas(0.5, 3, (0.25, 0.5)).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])


@pytest.mark.parametrize("scales", [(1,), (1, 1, 1)])
def test_one_scale_is_needed_per_exit_but_the_last(scales):
    with pytest.raises(
        ValueError, match=f"{len(scales)} quota scales .*for 3 exits; give one per exit but the last"
    ):
        geometric_quotas(0.5, 3, scales)


@pytest.mark.parametrize(("scales", "k"), [((4, 1), 0), ((1, 2.5), 1), ((-1, 1), 0)])
def test_scales_beyond_everybody_are_refused(scales, k):
    with pytest.raises(ValueError, match=f"quota scales .* at exit {k}"):
        geometric_quotas(1.0, 3, scales)


def test_ratios_of_the_published_sweeps():
    assert pytest.approx(np.linspace(0.05, 1.95, 39)) == MSDNET_RATIOS
    first, second = DYN_PERCEIVER_RATIOS[:17], DYN_PERCEIVER_RATIOS[17:]
    assert len(DYN_PERCEIVER_RATIOS) == 33
    assert first == pytest.approx(np.linspace(0.2, 1.0, 17))
    assert (second[0], second[1], second[-1]) == (1, 20 / 19, 4)
    assert second == sorted(second)


def test_simulate():
    confidence = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.0, 0.8, 0.9, 0.3], [0.0] * 4])
    correct = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    result = simulate(confidence, correct, torch.tensor([0.5, 0.8, EVERYBODY]), [1, 10, 100])
    assert result.exit_index.tolist() == [0, 1, 0, 2]  # right, right, wrong, right
    assert result.accuracy == 0.75
    assert result.shares == [0.5, 0.25, 0.25]
    assert result.cost == 0.5 * 1 + 0.25 * 10 + 0.25 * 100


def test_simulate_counts_exits_that_nobody_uses():
    correct = torch.ones(3, 2, dtype=torch.bool)
    result = simulate(torch.ones(3, 2), correct, torch.tensor([0.5, 0.5, EVERYBODY]), [1, 2, 3])
    assert result.shares == [1, 0, 0] and result.cost == 1 and result.accuracy == 1


ACCURACIES, COSTS = [0.6, 0.7, 0.8, 0.8, 0.75], [10, 20, 40, 30, 50]


@pytest.mark.parametrize(("budget", "index"), [(10, 0), (29, 1), (30, 3), (40, 3), (1e9, 3)])
def test_within_budget_is_the_most_accurate_that_is_affordable(budget, index):
    assert within_budget(ACCURACIES, COSTS, budget) == index


def test_a_budget_below_every_cost_is_refused():
    with pytest.raises(ValueError, match="a budget of 9 multiply-adds is below the cheapest setting's 10"):
        within_budget(ACCURACIES, COSTS, 9)


@pytest.mark.parametrize(("accuracy", "index"), [(0.0, 0), (0.65, 1), (0.7, 1), (0.75, 3), (0.8, 3)])
def test_cheapest_is_accurate_enough(accuracy, index):
    assert cheapest(ACCURACIES, COSTS, accuracy) == index


def test_an_accuracy_above_every_setting_is_refused():
    with pytest.raises(ValueError, match="^an accuracy of 0.9 is above the best setting's 0.8$"):
        cheapest(ACCURACIES, COSTS, 0.9)


def test_a_quota_per_exit():
    with pytest.raises(ValueError, match="5 quotas for 4 exits"):
        quota_thresholds(torch.rand(4, 10), torch.full((5,), 0.2))


def test_the_wide_sweep_reaches_from_nearly_everybody_to_nearly_nobody():
    shares = [geometric_quotas(ratio, 2)[0].item() for ratio in WIDE_RATIOS]
    assert shares == pytest.approx([1 - i / 100 for i in range(1, 100)], abs=1e-5)
