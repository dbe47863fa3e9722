import pytest
import torch
from torch.testing import assert_close

from adaptive.confidence import max_prob
from adaptive.reading import Reading

LOGITS = torch.tensor(
    [
        [[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[0.0, 2.0, 0.0], [0.0, 0.0, 1.5], [0.0, 9.0, 0.0]],
    ]
)  # [K, B, C]


def read(**options):
    reads = Reading(**options).read_all(LOGITS)
    return torch.stack([one.answers for one in reads]), torch.stack([one.confidence for one in reads])


def test_an_exit_answers_by_itself_unless_asked_otherwise():
    answers, confidence = read()
    assert torch.equal(answers, LOGITS) and torch.equal(confidence, max_prob(LOGITS))
    assert Reading().read(0, LOGITS[0]).memory is None


def test_the_most_confident_answer_so_far_is_recalled():
    answers, confidence = read(answer="best")
    assert answers.argmax(-1).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert torch.equal(confidence, max_prob(LOGITS).cummax(0).values)
    # Of two equal exits the later one answers.
    assert torch.equal(Reading(answer="best").read_all([LOGITS[0], LOGITS[0] + 1])[1].answers, LOGITS[0] + 1)


def test_the_mean_is_of_probabilities():
    answers, confidence = read(answer="mean")
    means = LOGITS.softmax(-1).cumsum(0) / torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert_close(answers.exp(), means)
    assert_close(confidence, means.amax(-1))
    far = torch.tensor([[0.0, -1e4]])
    assert Reading(answer="mean").read(0, far).answers.isfinite().all()


def test_agreement_counts_equal_answers_in_a_row():
    _, confidence = read(confidence="agreement")
    assert confidence.tolist() == [[1, 1, 1], [1, 2, 2], [2, 1, 3]]
    _, of_means = read(confidence="agreement", answer="mean")
    assert of_means.tolist() == [[1, 1, 1], [2, 2, 2], [1, 3, 3]]


def test_temperatures_divide_the_logits_of_each_exit():
    answers, confidence = read(temperatures=(1.0, 2.0, 0.5))
    scaled = LOGITS / torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    assert torch.equal(answers, scaled) and torch.equal(confidence, max_prob(scaled))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"answer": "first"}, "unknown answer 'first'; accepted: exit, best, mean"),
        ({"confidence": "maxprob"}, "unknown confidence 'maxprob'"),
        ({"confidence": "agreement", "answer": "best"}, "cannot tell the best|cannot say which"),
        ({"temperatures": (1.0, 0.0)}, "temperature 0.0: accepted: numbers above 0"),
    ],
)
def test_what_cannot_be_read_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Reading(**options)
