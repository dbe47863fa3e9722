import pickle

import pytest
import torch
import torch.nn.functional as F

from adaptive.calibration import GRID, TemperatureFit, accuracy_map
from adaptive.confidence import EVERYBODY, NOBODY


def answers(seed, count=600, classes=5):
    """Logits of three exits, [K, N, C], from underconfident to overconfident, and targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(3, count, classes, generator=generator) + 1.5 * F.one_hot(targets, classes)
    return logits * torch.tensor([0.2, 1.0, 7.0])[:, None, None], targets


def fitted(logits, targets, size=100):
    fit = TemperatureFit()
    for start in range(0, len(targets), size):
        fit.add([one[start : start + size] for one in logits], targets[start : start + size])
    return fit


def by_descent(logits, targets):
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.double() / log_t.exp(), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.exp().item()


@pytest.mark.parametrize("seed", range(3))
def test_temperatures_are_those_of_a_descent_on_all_logits(seed):
    logits, targets = answers(seed)
    found = fitted(logits, targets).temperatures()
    assert found == pytest.approx([by_descent(one, targets) for one in logits], rel=1e-3)
    assert found[0] < 0.5 and found[2] > 3


def test_sharper_logits_have_a_higher_temperature_and_halves_are_enough():
    logits, targets = answers(0)
    found = fitted(logits, targets).temperatures()
    sharper = fitted(1.3 * logits, targets).temperatures()
    assert sharper == pytest.approx([1.3 * value for value in found], rel=1e-3)
    assert fitted(logits.bfloat16(), targets).temperatures() == pytest.approx(found, rel=0.02)


def test_processes_add_up_and_logits_are_not_kept():
    logits, targets = answers(1)
    with torch.inference_mode():  # as an evaluation calls it
        shards = [fitted(logits[:, rank::2], targets[rank::2], size=7) for rank in range(2)]
    shards = pickle.loads(pickle.dumps([*shards, TemperatureFit()]))
    whole = TemperatureFit.merged(shards)
    assert whole.temperatures() == pytest.approx(fitted(logits, targets).temperatures(), rel=1e-5)
    assert whole.slopes.shape == (3, len(GRID)) and TemperatureFit.merged([TemperatureFit()]).slopes is None


@pytest.mark.parametrize("size", [3.0, 30.0])  # with the latter, probabilities come out as 0 and 1
def test_exits_that_are_always_right_or_know_nothing_get_the_ends(size):
    targets = torch.arange(4).repeat(5)
    right = size * F.one_hot(targets, 4)
    assert fitted(torch.stack([right, -right]), targets).temperatures() == (GRID[0], GRID[-1])


# From confidence to accuracy


def test_steps_rise_and_say_from_where_on_an_accuracy_is_expected():
    confidence = torch.tensor([0.6, 0.1, 0.3, 0.2, 0.5, 0.4])
    correct = torch.tensor([1, 0, 0, 1, 1, 1]).bool()
    found = accuracy_map(confidence, correct, top=1)
    assert torch.equal(found.starts, torch.tensor([0.1, 0.2, 0.4]))
    assert found.accuracy.tolist() == [0, 0.5, 1] and found.counts.tolist() == [1, 2, 3]
    assert found.of(torch.tensor([[0.0, 0.15], [0.2, 0.9]])).tolist() == [[0, 0], [0.5, 1]]
    limits = [found.threshold(accuracy) for accuracy in (0, 0.5, 0.51, 1)]
    assert limits == pytest.approx([EVERYBODY, 0.2, 0.4, 0.4])
    assert accuracy_map(confidence, ~correct, top=1).threshold(0.9) == NOBODY


def test_equal_confidences_are_never_split():
    found = accuracy_map(torch.tensor([0.5, 0.5, 0.5, 0.9]), torch.tensor([1, 0, 0, 1]).bool(), top=2)
    assert found.starts.tolist() == [0.5] and found.accuracy.tolist() == [0.5]  # 0.9 alone is no group of 2
    found = accuracy_map(torch.tensor([0.5, 0.5, 0.5, 0.9]), torch.tensor([1, 0, 0, 1]).bool(), top=1)
    assert found.starts.tolist() == pytest.approx([0.5, 0.9]) and found.counts.tolist() == [3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_map_is_the_isotonic_regression(seed):
    """Of each value, the highest over starts below of the lowest mean up to an end above."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(12, (40,), generator=generator).float()
    correct = torch.rand(40, generator=generator) < confidence / 12
    found = accuracy_map(confidence, correct, top=1)
    values = confidence.unique().tolist()

    def share(low, high):
        return correct[(confidence >= low) & (confidence <= high)].double().mean().item()

    for value in values:
        lows, highs = [v for v in values if v <= value], [v for v in values if v >= value]
        expected = max(min(share(low, high) for high in highs) for low in lows)
        assert found.of(torch.tensor(value)).item() == pytest.approx(expected)
    assert (found.accuracy.diff() > 0).all() and found.counts.sum() == 40


def test_a_few_lucky_answers_at_the_top_prove_nothing():
    confidence = torch.linspace(0, 1, 400)
    correct = torch.arange(400) % 2 == 0
    correct[-8:] = True
    assert accuracy_map(confidence, correct, top=1).threshold(0.95) <= confidence[-8]
    guarded = accuracy_map(confidence, correct)
    assert guarded.threshold(0.95) == NOBODY and guarded.counts[-1] >= 50
