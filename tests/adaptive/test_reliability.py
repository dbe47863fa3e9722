from math import isnan

import pytest
import torch

from adaptive.exit_tables import ExitTables
from adaptive.reading import Reading
from adaptive.reliability import confidence_figures, failure_prediction, reliability
from adaptive.routing import auroc


def test_bins_have_their_upper_end_and_empty_ones_are_said():
    confidence = torch.tensor([[0.0, 1 / 15, 0.07, 1.0, 1 + 1e-7]], dtype=torch.float64)
    (found,) = reliability(confidence, torch.tensor([[0, 1, 0, 1, 0]]).bool())
    assert [one.count for one in found.bins] == [2, 1] + [0] * 12 + [2]
    assert found.bins[0].accuracy == 0.5 and found.bins[0].confidence == pytest.approx(1 / 30)
    assert found.bins[-1].accuracy == 0.5 and isnan(found.bins[5].confidence)


def test_calibration_is_the_sum_over_bins():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 500, generator=generator)
    correct = torch.rand(2, 500, generator=generator) < confidence.square()
    for k, found in enumerate(reliability(confidence, correct)):
        expected = 0.0
        for i in range(15):
            inside = (confidence[k] > i / 15) & (confidence[k] <= (i + 1) / 15)
            distance = confidence[k, inside].mean() - correct[k, inside].double().mean()
            expected += inside.sum() / 500 * distance.abs()
        assert found.ece == pytest.approx(float(expected), abs=1e-6)
        assert found.gap == pytest.approx(float((confidence[k] - correct[k].float()).mean()), abs=1e-6)
        assert found.gap > 0.1 and found.auroc == auroc(confidence[k], correct[k])
        assert found.brier == pytest.approx(float((confidence[k] - correct[k].float()).square().mean()))


def test_an_honest_exit_has_no_error_and_a_boaster_all_of_it():
    confidence = torch.tensor([[0.75] * 4, [1.0] * 4])
    correct = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    honest, boaster = reliability(confidence, correct)
    assert (honest.ece, honest.gap, honest.auroc) == (0, 0, 0.5) and boaster.ece == boaster.gap == 0.75


CONFIDENCE = torch.tensor([[0.9, 0.2, 0.3, 0.4, 0.1], [0.5, 0.6, 0.7, 0.8, 0.9], [1.0] * 5])
CORRECT = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()


def test_failures_are_wrong_answers_that_a_later_exit_corrects():
    first, second = failure_prediction(CONFIDENCE, CORRECT)
    # At exit 0 samples 1, 2, 3 pay; of the pairs with 0 and 4, all with 0 are in order, none with 4 is.
    assert (first.rate, first.auroc) == (0.6, 0.5)
    assert second.rate == 0.4 and second.auroc == pytest.approx((3 + 1) / 6)
    assert failure_prediction(CONFIDENCE, torch.ones(3, 5).bool())[0].auroc is None


def test_figures_of_every_exit_with_and_without_temperatures():
    generator = torch.Generator().manual_seed(0)
    logits, targets = 4 * torch.randn(3, 60, 4, generator=generator), torch.arange(60) % 4
    logits[1:, torch.arange(60), targets] += 3
    reading = Reading("entropy", temperatures=(8.0, 4.0, 2.0))
    plain, scaled = (ExitTables.of(list(logits), targets, one) for one in ("entropy", reading))
    first, second, last = confidence_figures(plain, scaled, reading.temperatures)
    assert [row.exit for row in (first, second, last)] == [0, 1, 2] and second.temperature == 4.0
    assert first.nll == pytest.approx(plain.means()["loss"][0]) and first.nll_scaled < first.nll
    expected = reliability(logits.softmax(-1).amax(-1), plain.correct)
    assert first.ece == pytest.approx(expected[0].ece) and last.auroc == pytest.approx(expected[2].auroc)
    assert first.gap_scaled < first.gap and first.ece_scaled < first.ece
    assert first.failure_rate > 0.2 and last.failure_rate is None and last.failure_auroc is None
    alone = confidence_figures(plain)
    assert alone[0].nll_scaled is None and alone[0].temperature is None
    assert alone[0].failure_rate == first.failure_rate
