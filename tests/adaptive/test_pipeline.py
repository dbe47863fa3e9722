import pytest
import torch

from adaptive.pipeline import Pipeline
from adaptive.policy import Policy

# Logits (x, 0) are confident if x is far from 0; "margin" of 0.5 is |x| = log 3.
POLICY = Policy((0.5, 0.5, 0.0), "margin")


def doubling(calls):
    """Three plain callables that answer (x, 0) and double x; they note the numbers that they see."""

    def stage(state):
        calls.append(state["x"].tolist())
        logits = torch.stack([state["x"], torch.zeros_like(state["x"])], dim=1)
        return logits, {"x": 2 * state["x"], "none": None}

    def first(x):
        return stage({"x": x})

    return [first, stage, stage]


def test_stages_are_any_callables():
    calls = []
    pipeline = Pipeline(doubling(calls), POLICY)
    assert pipeline.put(torch.tensor([3.0, 0.1, 0.9])) == range(3)
    assert [pipeline.ready(k) for k in range(3)] == [True, False, False]
    ids, logits, exits = pipeline.run(0)
    assert (ids.tolist(), exits.tolist()) == ([0], [0]) and logits.tolist() == [[3.0, 0.0]]
    assert pipeline.waiting(0) == 0 and pipeline.waiting(1) == 2
    assert pipeline.run(1).ids.tolist() == [2]
    answers = pipeline.run(2)
    assert (answers.ids.tolist(), answers.exits.tolist()) == ([1], [2])
    assert answers.logits[0, 0].item() == pytest.approx(0.4)
    assert calls[1] == pytest.approx([0.2, 1.8]) and not any(pipeline.ready(k) for k in range(3))


def test_survivors_of_several_batches_are_pooled():
    calls = []
    pipeline = Pipeline(doubling(calls), POLICY, micro_batch=2)
    assert pipeline.put(torch.tensor([0.1, 9.0])) == range(2)
    assert pipeline.run(0).ids.tolist() == [1]
    assert not pipeline.ready(1) and pipeline.waiting(1) == 1
    assert pipeline.put(torch.tensor([8.0, 0.2, 0.3])) == range(2, 5)
    assert pipeline.run(0).ids.tolist() == [2]  # two of the three
    assert pipeline.ready(1) and not pipeline.ready(0) and pipeline.waiting(0) == 1
    assert len(pipeline.run(1).ids) == 0
    assert pipeline.run(0).ids.tolist() == []
    assert [len(seen) for seen in calls] == [2, 2, 2, 1]
    assert calls[2] == pytest.approx([0.2, 0.4])  # of both batches
    assert pipeline.run(2).ids.tolist() == [0, 3]


def test_nobody_and_everybody():
    calls = []
    pipeline = Pipeline(doubling(calls), POLICY)
    pipeline.put(torch.tensor([0.1, 0.2]))
    assert pipeline.run(0).logits.shape == (0, 2)
    pipeline.put(torch.tensor([7.0, 8.0]))
    assert pipeline.run(0).ids.tolist() == [2, 3]
    assert pipeline.waiting(0) == 0 and pipeline.waiting(1) == 2


def test_thresholds_of_another_network_are_refused():
    with pytest.raises(ValueError, match="3 thresholds for a network with 2 exits"):
        Pipeline(doubling([])[:2], POLICY)


@pytest.mark.parametrize("size", [0, -3])
def test_micro_batches_hold_an_image_or_more(size):
    with pytest.raises(ValueError, match=f"^micro_batch is {size}; accepted: 1 and more, or None$"):
        Pipeline(doubling([]), POLICY, size)
