import pytest
import torch

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.exit_tables import ExitTables
from adaptive.inference import run_adaptive
from adaptive.one_number import mapped_policies, mapped_thresholds, patience_policies
from adaptive.policy import Policy
from adaptive.reading import Reading
from adaptive.thresholds import exit_of


def drawn(count, seed):
    """Confidence and correct [4, N] of exits that get better; how hard a sample is, all of them see."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.randn(count, generator=generator)
    evidence = ease + torch.arange(4)[:, None] / 2 + torch.randn(4, count, generator=generator)
    correct = torch.rand(4, count, generator=generator) < (evidence + ease).sigmoid()
    return evidence.sigmoid(), correct


@pytest.mark.parametrize("wanted", [0.7, 0.8, 0.9])
def test_early_answers_to_fresh_samples_are_as_right_as_wanted(wanted):
    limits = mapped_thresholds(*drawn(10_000, 0), wanted)
    confidence, correct = drawn(20_000, 1)
    exits = exit_of(confidence, limits)
    for k in range(3):
        left = exits == k
        error = (wanted * (1 - wanted) / left.sum()) ** 0.5
        assert left.sum() > 300 and correct[k, left].double().mean() >= wanted - 2 * error
        # Not more careful than need be: the least confident of them are not much better.
        least = left & (confidence[k] <= confidence[k, left].quantile(0.2))
        assert correct[k, least].double().mean() < wanted + 0.1


def test_maps_are_of_the_samples_that_still_reach_the_exit():
    """Half of the samples leave at exit 0. Exit 1 tells nothing apart: all in all 8 of 10 are right, of the
    others 6."""
    easy = torch.arange(1000) < 500
    confidence = torch.stack([easy.float(), torch.full((1000,), 0.5), torch.ones(1000)])
    correct = torch.stack([easy, easy | (torch.arange(1000) % 5 < 3), torch.ones(1000).bool()])
    assert mapped_thresholds(confidence, correct, 0.75).tolist() == [1, NOBODY, EVERYBODY]
    assert mapped_thresholds(confidence, correct, 0.75, everybody=True).tolist() == [1, EVERYBODY, EVERYBODY]
    assert mapped_thresholds(confidence, correct, 0.6).tolist() == [1, EVERYBODY, EVERYBODY]


def test_everybody_leaves_at_once_where_that_is_good_enough():
    confidence = torch.rand(3, 100, generator=torch.Generator().manual_seed(0))
    limits = mapped_thresholds(confidence, torch.ones(3, 100).bool(), 1.0)
    assert limits.tolist() == [EVERYBODY, NOBODY, EVERYBODY]
    assert mapped_thresholds(confidence, torch.zeros(3, 100).bool(), 0.1).tolist()[:2] == [NOBODY] * 2


def test_a_policy_per_accuracy_reads_as_its_tables_were_read():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (400,), generator=generator)
    logits = torch.randn(3, 400, 4, generator=generator)
    logits[:, torch.arange(400), targets] += torch.tensor([1.5, 2.0, 3.0])[:, None]
    reading = Reading("margin", "mean", (1.0, 2.0, 1.5))
    calib = ExitTables.of(list(logits), targets, reading)
    policies = mapped_policies(calib, reading, [0.5, 0.8, 0.925])
    assert [one.name for one in policies] == [f"mapped accuracy {text} %" for text in ("50", "80", "92.5")]
    assert all(one.reading == reading for one in policies)
    points = [one.simulate(calib, [1, 2, 3]) for one in policies]
    assert points[0].macs < points[1].macs < points[2].macs
    left = policies[1].exit_of(calib)
    for k in range(2):
        assert calib.correct[k, left == k].double().mean() >= 0.8


# Patience


def pabee(predicted, patience):
    """The exit of one sample, whose predictions are [K]: the published loop, one exit after another."""
    agreeing, before = 0, None
    for k, label in enumerate(predicted):
        agreeing = agreeing + 1 if label == before else 1
        before = label
        if agreeing == patience:
            return k
    return len(predicted) - 1


def test_patience_is_counted_exit_by_exit():
    logits = torch.randn(5, 300, 3, generator=torch.Generator().manual_seed(0))
    calib = ExitTables.of(list(logits), torch.zeros(300).long(), "agreement")
    policies = patience_policies(5)
    assert [one.name for one in policies] == [f"patience {p}" for p in (2, 3, 4, 5)]
    for patience, policy in enumerate(policies, start=2):
        expected = [pabee(labels, patience) for labels in logits.argmax(-1).T.tolist()]
        assert policy.exit_of(calib).tolist() == expected
    assert set(expected) == {4}


@torch.no_grad()
@pytest.mark.parametrize("answer", ["exit", "mean"])
def test_patience_exits_as_simulated(relay_class, answer):
    torch.manual_seed(0)
    network, images = relay_class().double().eval(), torch.randn(40, 3, 2, 2, dtype=torch.float64)
    policy = patience_policies(3, answer)[0]
    assert policy == Policy((2.0, 2.0, EVERYBODY), "agreement", "patience 2", answer)
    tables = ExitTables.of(network(images), torch.zeros(40).long(), policy.reading)
    exits = run_adaptive(network, images, policy)[1]
    assert torch.equal(exits, policy.exit_of(tables)) and exits.unique().tolist() == [1, 2]
