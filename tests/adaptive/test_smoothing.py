import pytest
import torch

from adaptive.smoothing import SAMPLES, features, fit


def smoothed(confidence, correct):
    """The probability [K, N] that each exit is right, fitted on these samples."""
    inputs = features(confidence)
    return (fit(inputs, correct) @ inputs.mT).sigmoid()


def sample(count, seed=0):
    """Confidences [2, N] whose normal scores decide how probably [2, N] each exit is right."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, count, generator=generator, dtype=torch.float64)
    chance = torch.stack([1 + scores[0], 1 + scores[0] + scores[1] - 0.5 * scores[1] ** 2]).sigmoid()
    return scores, torch.rand(2, count, generator=generator) < chance, chance


def test_probabilities_are_recovered():
    scores, correct, chance = sample(4000)
    found = smoothed(scores, correct)
    assert (found - chance).square().mean(1).sqrt().max() < 0.02
    assert found.mean(1).tolist() == pytest.approx(correct.double().mean(1).tolist(), abs=1e-3)


def test_only_the_order_of_confidences_counts():
    scores, correct, _ = sample(300)
    assert torch.equal(smoothed(scores, correct), smoothed((3 * scores).exp(), correct))


def test_ties_share_a_rank_and_half_of_them_are_in_the_middle():
    inputs = features(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(inputs, torch.tensor([[1.0, 0.0, 0.0]] * 4).double())


def test_an_exit_that_is_always_right_and_a_single_sample():
    found = smoothed(torch.rand(2, 50), torch.ones(2, 50, dtype=torch.bool))
    assert (found > 0.99).all() and found.isfinite().all()
    assert smoothed(torch.rand(2, 1), torch.tensor([[True], [False]])).isfinite().all()


def test_from_weights_of_other_samples_two_steps_are_enough():
    scores, correct, _ = sample(2000)
    inputs = features(scores)
    whole = fit(inputs, correct)
    warm, cold = fit(inputs[500:], correct[:, 500:], whole), fit(inputs[500:], correct[:, 500:])
    torch.testing.assert_close(warm, cold, atol=1e-3, rtol=0)


def test_more_exits_have_products_of_neighbours_only():
    for exits, products in ((6, 21), (8, 15)):
        assert features(torch.rand(exits, 5)).shape == (5, 1 + exits + products)


def test_samples_in_the_order_of_classes_are_fitted_on_evenly():
    right = (torch.arange(2 * SAMPLES) < SAMPLES)[None]
    found = smoothed(torch.zeros(1, 2 * SAMPLES), right)
    assert found.mean().item() == pytest.approx(0.5, abs=1e-3)
