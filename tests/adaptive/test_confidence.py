import math

import pytest
import torch

from adaptive.confidence import (
    CONFIDENCES,
    confidence_function,
    energy_logits,
    energy_softmax,
    entropy,
    margin,
    max_prob,
)

# Softmax (0.5, 0.3, 0.2), shifted by a constant that must not matter to functions of the softmax.
LOGITS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log() + 3

every_kind = pytest.mark.parametrize("kind", CONFIDENCES)


def test_max_prob():
    assert max_prob(LOGITS).item() == pytest.approx(0.5)


def test_margin():
    assert margin(LOGITS).item() == pytest.approx(0.2)


def test_entropy_is_negated_and_in_nats():
    assert entropy(LOGITS).item() == pytest.approx(
        0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)
    )


def test_entropy_of_certainty_is_zero():
    assert entropy(torch.tensor([500.0, 0.0, 0.0])).item() == 0


def test_energy_logits():
    assert energy_logits(LOGITS).item() == pytest.approx(3)  # the softmax sums to 1, shifted by 3
    # T = 2: 2 log(sum of square roots)
    roots = sum(math.sqrt(p) for p in (0.5, 0.3, 0.2))
    assert energy_logits(LOGITS, 2.0).item() == pytest.approx(3 + 2 * math.log(roots))


def test_energy_softmax():
    assert energy_softmax(LOGITS).item() == pytest.approx(math.log(sum(math.exp(p) for p in (0.5, 0.3, 0.2))))
    halves = sum(math.exp(p / 2) for p in (0.5, 0.3, 0.2))
    assert energy_softmax(LOGITS, 2.0).item() == pytest.approx(2 * math.log(halves))


def test_energy_softmax_of_ten_classes_spans_very_little():
    sure, unsure = torch.zeros(10), torch.zeros(10)
    sure[0] = 1000
    span = energy_softmax(sure) - energy_softmax(unsure)
    assert span.item() == pytest.approx(0.0586, abs=5e-5)


def test_energies_are_float64():
    assert energy_logits(LOGITS.float()).dtype == energy_softmax(LOGITS.half()).dtype == torch.float64


def test_energy_softmax_tells_apart_what_float32_cannot():
    # Both probabilities of the best class round to 1 in float32.
    scores = energy_softmax(torch.tensor([[20.0, 0.0], [25.0, 0.0]]))
    assert scores[0] < scores[1]


@pytest.mark.parametrize("function", [max_prob, margin, entropy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_judged_in_float32(function, dtype):
    logits = torch.tensor([[9.0, 0.0], [8.0, 0.0]], dtype=dtype)
    scores = function(logits)
    assert scores.dtype == torch.float32 and scores[0] > scores[1]
    assert torch.equal(scores, function(logits.float()))
    assert function(logits.double()).dtype == torch.float64


@every_kind
def test_higher_is_surer(kind):
    ladder = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    scores = confidence_function(kind)(ladder)
    assert torch.all(scores[1:] > scores[:-1])


@every_kind
def test_classes_are_the_last_axis(kind):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    scores = confidence_function(kind)(logits)
    assert scores.shape == (3, 4)
    assert scores[2, 1].item() == pytest.approx(confidence_function(kind)(logits[2, 1]).item())


def test_a_margin_needs_two_classes():
    with pytest.raises(ValueError, match=r"^margin compares .*: 2 or more are needed, there is 1$"):
        margin(torch.zeros(3, 1))
    assert margin(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_the_kinds_are_those_of_the_command_line():
    assert set(CONFIDENCES) == {"max_prob", "margin", "entropy", "energy_logits", "energy_softmax"}


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown confidence 'maxprob'; did you mean max_prob"):
        confidence_function("maxprob")


def test_an_energy_takes_a_temperature_behind_its_name():
    logits = torch.tensor([[1.0, 3.0, -2.0]])
    for name, function in (("energy_logits", energy_logits), ("energy_softmax", energy_softmax)):
        assert torch.equal(confidence_function(f"{name}:2.5")(logits), function(logits, 2.5))
        assert torch.equal(confidence_function(name)(logits), function(logits))


@pytest.mark.parametrize("kind", ["max_prob:2", "energy_logits:0", "energy_logits:warm", "energy_softmax:"])
def test_bad_temperatures_are_named(kind):
    with pytest.raises(
        ValueError, match="a temperature is a number above 0, behind energy_logits or energy_softmax"
    ):
        confidence_function(kind)
