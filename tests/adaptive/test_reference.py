"""A reference says exactly how likely new samples fall between its edges, and survives a file."""

import json

import numpy as np
import pytest
import torch

from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.reference import Reference, hardness, numbers
from utils import UserError


def some_samples(count, seed=0, levels=0):
    """Exits and confidence [N]; of few different levels if wanted."""
    rng = np.random.default_rng(seed)
    confidence = rng.integers(levels, size=count) if levels else rng.random(count)
    return rng.integers(3, size=count), confidence


def test_samples_are_ordered_by_exit_and_then_by_confidence():
    exits, confidence = some_samples(200)
    order = np.argsort(hardness(exits, confidence, 3))
    assert order.tolist() == sorted(range(200), key=lambda i: (exits[i], -confidence[i]))


@pytest.mark.parametrize("count, bins", [(1, 100), (7, 3), (60, 100), (500, 100), (501, 4)])
def test_edges_are_evenly_spread(count, bins):
    reference = Reference.of(*some_samples(count), num_exits=3, bins=bins)
    assert sum(reference.weights) == count + 1 == len(reference) + 1
    assert len(reference.weights) == min(bins, count + 1)
    assert max(reference.weights) - min(reference.weights) <= 1


@pytest.mark.parametrize("levels", [0, 2])
def test_a_left_out_sample_falls_between_edges_as_often_as_weights_say(levels):
    exits, confidence = some_samples(12, levels=levels)
    found = np.zeros(4)
    for seed in range(40 if levels else 1):
        for i in range(12):
            rest = np.arange(12) != i
            reference = Reference.of(exits[rest], confidence[rest], num_exits=3, bins=4, seed=seed)
            ties = np.random.default_rng([seed, 9, i]).random(50)
            sample = hardness(exits[[i] * 50], confidence[[i] * 50], 3)
            found += np.bincount(reference.bins(sample, ties), minlength=4)
    expected = np.array(reference.weights) / 12
    np.testing.assert_allclose(found / found.sum(), expected, atol=0.03 if levels else 1e-12)


def test_bins_count_the_edges_below():
    exits, confidence = some_samples(300, levels=5)
    reference = Reference.of(exits, confidence, num_exits=3, bins=50)
    places, values = some_samples(200, seed=1, levels=5)
    ties = np.random.default_rng(2).random(200)
    found = reference.bins(hardness(places, values, 3), ties)
    edges = [(k, -value, tie) for k, value, tie in reference.edges]
    samples = zip(places, -values, ties, strict=True)
    assert found.tolist() == [sum(edge < sample for edge in edges) for sample in samples]


def test_the_samples_of_tables_leave_where_the_policy_says():
    torch.manual_seed(0)
    logits, targets = [3 * torch.randn(40, 4) for _ in range(3)], torch.randint(4, (40,))
    tables = ExitTables.of(logits, targets)
    policy = Policy.of([0.9, 0.8, -1e8])
    met = policy.outcome(tables)
    for i in range(40):
        k = next(k for k in range(3) if k == 2 or tables.confidence[k, i] >= policy.thresholds[k])
        assert (met.exits[i], met.confidence[i], met.correct[i]) == (
            k,
            tables.confidence[k, i],
            logits[k][i].argmax() == targets[i],
        )
    reference = Reference.of_policy(policy, tables, bins=10)
    assert (
        reference.left == tuple(met.exits.bincount(minlength=3).tolist())
        and reference.labelled == reference.left
    )
    assert reference.wrong == tuple(met.exits[~met.correct].bincount(minlength=3).tolist())


def test_labels_may_be_missing():
    reference = Reference.of([0, 1, 1, 0], [1, 2, 3, 4], [True, None, False, float("nan")], num_exits=2)
    assert (reference.left, reference.labelled, reference.wrong) == ((2, 2), (1, 1), (0, 1))
    assert Reference.of([0, 1], [1, 2], num_exits=2).labelled == (0, 0)


def test_columns_may_be_of_any_kind():
    values = [0.1, 1 / 3, 2.5]
    assert numbers(values).tolist() == numbers(torch.tensor(values, dtype=torch.float64)).tolist() == values
    assert numbers(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]
    assert numbers(torch.tensor([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "exits, confidence, correct, words",
    [
        ([0, 3], [1, 2], None, "exit 3; accepted: 0 to 2"),
        ([0, 0.5], [1, 2], None, "exit 0.5"),
        ([0, None], [1, 2], None, "exit nan"),
        ([0, 1], [1], None, "2 exits with 1 values of confidence"),
        ([0, 1], [1, float("inf")], None, "confidence inf; accepted: finite"),
        ([0, 1], [1, 2], [1], "2 exits with 1 values of correct"),
        ([0, 1], [1, 2], [1, 2], "correct 2; accepted: true, false"),
        ([], [], None, "needs samples"),
    ],
)
def test_what_is_refused(exits, confidence, correct, words):
    with pytest.raises(UserError, match=words):
        Reference.of(exits, confidence, correct, num_exits=3)


def test_a_file_brings_it_back(tmp_path):
    exits, confidence = some_samples(150)
    reference = Reference.of(exits, confidence, confidence > 0.1, num_exits=3, bins=20)
    reference.save(tmp_path / "reference.json")
    assert Reference.load(tmp_path / "reference.json") == reference


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"weights": [1]},
        {"weights": "many"},
        {"left": [1, 2, 3]},
        {"wrong": [10**30, 0, 0]},
        {"wrong": [0, 0]},
        {"edges": [[0, "high", 0.5]]},
        {"more": [1]},
        {"edges": None},
        {"edges": [[2, 0.1, 0.5], [0, 0.2, 0.5], [1, 0.1, 0.5], [1, 0.2, 0.5]]},
        {"edges": [[0, 0.4, 0.5], [1, float("nan"), 0.5], [1, 0.2, 0.5], [2, 0.1, 0.5]]},
        {"edges": [[0, 0.4, 0.5], [1, 0.3, 0.5], [1, 0.2, 0.5], [3, 0.1, 0.5]]},
    ],
)
def test_a_damaged_file_is_refused(change, tmp_path):
    path = tmp_path / "reference.json"
    Reference.of(*some_samples(9), num_exits=3, bins=5).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="no reference that can be read"):
        Reference.load(path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="no reference that can be read"):
        Reference.load(path)
