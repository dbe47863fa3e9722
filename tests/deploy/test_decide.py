"""Policies in NumPy decide as those in PyTorch do."""

import copy
import json

import numpy as np
import pytest
import torch

from adaptive.policy import Policy
from adaptive.reading import Reading
from deploy import decide
from deploy.decide import RunnerError

KINDS = ["max_prob", "margin", "entropy", "energy_logits", "energy_softmax", "energy_logits:2.5"]
READINGS = [
    Reading(kind, answer, temperatures)
    for kind in (*KINDS, "energy_softmax:0.5", "agreement")
    for answer in ("exit", "best", "mean")
    for temperatures in ((), (0.7, 1.9, 3.0))
    if (kind, answer) != ("agreement", "best")
]
WRITTEN = {"schema": 2, "thresholds": [0.5, 0.25, -1e8], "confidence": "max_prob", "off": []}
DAMAGES = [
    *({"schema": value} for value in (0, 3, "2", None, [])),
    *({"thresholds": value} for value in ([], None, 0.5, ["0.5"], [True], [None], [[0.5]], [10**400], {})),
    *({"thresholds": [value, 0.0]} for value in (float("nan"), float("inf"), -float("inf"))),
    *({"confidence": value} for value in ("", "x", "max_prob:2", "energy_logits:", "energy_logits:0", 3, [])),
    *({"confidence": f"energy_softmax:{value}"} for value in ("nan", "inf", "-1", "1:2", "x")),
    *({"answer": value} for value in ("last", "", None, 1)),
    {"answer": "best", "confidence": "agreement"},
    *({"temperatures": value} for value in ([1.0], [0, 1, 1], [1, 1, -1], ["1"] * 3, 1, None)),
    *({"off": value} for value in ([0], [2], [-1], [0.0], 1, "0", [True])),
    {"off": [0], "thresholds": [1e8, 0.0], "answer": "mean"},
    *({"model_hash": value} for value in (3, None)),
]


def extreme_logits(exits=3, classes=5):
    """Logits [K, B, C]: usual ones, large and small ones, equal ones, infinite ones."""
    rng = np.random.default_rng(0)
    usual = rng.normal(0, 3, (exits, 200, classes))
    few = rng.normal(0, 1, (exits, 8, classes))
    least = np.where(rng.random(few.shape) < 0.5, -np.inf, few)
    least[..., 0] = 1
    sure = np.zeros((exits, 8, classes))
    sure[..., 2] = 200
    parts = [usual, few * 1e4, few * 0.03, np.zeros((exits, 2, classes)), sure, least, few * 0 - 1e30]
    return np.concatenate(parts, 1).astype(np.float32)


def theirs_of(reading, thresholds, logits):
    """What adaptive/policy.py decides at every exit."""
    policy, memory = Policy.by(reading, thresholds), None
    for k, rows in enumerate(torch.from_numpy(logits)):
        answers, leaves, after = policy.decide(k, rows, memory)
        yield answers.numpy(), reading.read(k, rows, memory).confidence.numpy(), leaves.numpy()
        memory = after


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_the_same_samples_leave_with_the_same_answers(reading, tmp_path):
    logits = extreme_logits()
    scores = [score for _, score, _ in theirs_of(reading, [-1e8] * 3, logits)]
    # A sample's own confidence: one that is as confident leaves, within the noise of float32.
    thresholds = [float(score.max() if reading.agreement else score[5]) for score in scores[:2]] + [-1e8]
    Policy.by(reading, thresholds).save(tmp_path / "policy.json")
    ours, state, ties = decide.Policy(tmp_path / "policy.json"), {}, 0
    for k, (answers, score, leaves) in enumerate(theirs_of(reading, thresholds, logits)):
        found = ours.decide(k, logits[k], state)
        state = {"another": logits[k], **found[3]}
        np.testing.assert_allclose(found[1], score, rtol=1e-5, atol=2e-6)
        assert found[1].dtype == score.dtype and found[2].dtype == bool
        np.testing.assert_allclose(found[0], answers, rtol=1e-5, atol=2e-5)
        tied = np.isclose(score, thresholds[k], rtol=1e-6, atol=1e-6)
        assert (found[2] == leaves)[~tied].all()
        ties += int((found[2] != leaves).sum())
        assert k != 1 or 0 < leaves.sum() < len(leaves)
    # The energy of log probabilities is 0, whatever they are.
    assert leaves.all() and (
        ties <= 3 or (reading.confidence[:13], reading.answer) == ("energy_logits", "mean")
    )


def test_no_logits_are_a_number_warn_of_nothing():
    with np.errstate(all="raise"):
        policy = object.__new__(decide.Policy)
        policy.thresholds, policy.temperatures, policy.answer, policy.scale = [0.5, 0.0], [], "exit", 1.0
        for policy.kind in decide.CONFIDENCES:
            leaves = policy.decide(0, np.full((2, 3), np.nan, np.float32), {})[2]
            assert not leaves.any()  # as in PyTorch: no number is at least the threshold


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_policy_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**copy.deepcopy(WRITTEN), **damage}))
    with pytest.raises(RunnerError) as error:
        decide.Policy(path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000, "\xff", '{"schema": 2}', "NaN"])
def test_what_is_no_policy_is_refused(text, tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunnerError):
        decide.Policy(path)
    with pytest.raises(RunnerError, match="cannot be read"):
        decide.Policy(tmp_path / "none.json")


def test_an_undamaged_policy_is_read(tmp_path):
    for content in (WRITTEN, {**WRITTEN, "thresholds": [1e8, 0.25, 0], "off": [0]}, {**WRITTEN, "schema": 1}):
        (tmp_path / "policy.json").write_text(json.dumps(content))
        assert decide.Policy(tmp_path / "policy.json").thresholds == content["thresholds"]
