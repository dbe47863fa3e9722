"""Ways to find thresholds are compared on images that they were not found on."""

import pytest
import torch

from adaptive.costs import StageCosts
from adaptive.policy import Policy
from adaptive.reading import Reading
from experiment.checkpoint import load, save
from experiment.logits import Logits


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_policies")


@pytest.fixture(scope="module")
def logits():
    """Of 300 images: the second of three exits is as good as none, the third is the best."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (300,), generator=generator)
    hints = torch.nn.functional.one_hot(targets, 4) * torch.tensor([1.5, 0.0, 3.0])[:, None, None]
    costs = StageCosts((1e6,) * 3, (1e5,) * 3, ((), (0,), (0, 1)), (False,) * 3)
    return Logits(torch.randn(3, 300, 4, generator=generator) + hints, targets, 100, costs)


def test_the_search_beats_the_quota_rule(compare, logits):
    methods = compare.methods_of(logits, compare.Flags(mapped=20), "msdnet")[:3]
    budgets = [1.6e6, 2.2e6]
    found = compare.judge(methods, logits.costs, budgets, rounds=4)
    assert found.shape == (4, 3, 3, 2)
    accuracy, cost = found.mean(0).unbind(-1)
    assert (accuracy[2, :2] > accuracy[0, :2] + 0.03).all()
    assert (cost[:, :2] < 1.1 * torch.tensor(budgets)).all()
    assert accuracy[2, 2].abs() < 0.1  # less the last exit's
    again = compare.judge(methods, logits.costs, budgets, rounds=4)
    assert again.equal(found)


def test_policies_are_chosen_on_what_is_expected(compare):
    rows = [(0.5, 1), (0.7, 2), (0.6, 3), (0.8, 4)]
    policies = [Policy((-1e8,), accuracy=accuracy, macs=macs) for accuracy, macs in rows]
    assert [one.macs for one in compare.chosen(policies, [0.5, 3.5], 0.65)] == [1, 2, 2]
    assert [one.macs for one in compare.chosen(policies, [9], 0.9)] == [4, 4]


def test_rules_say_what_they_do(compare, logits):
    quota = compare.methods_of(logits, compare.Flags(mapped=20), "msdnet")[0]
    for policy in quota.find(quota.tables, logits.costs, Reading()):
        point = policy.simulate(quota.tables, logits.costs.leaving())
        assert (point.accuracy, point.macs) == (pytest.approx(policy.accuracy), pytest.approx(policy.macs))


def test_a_table_in_markdown(compare):
    found = torch.tensor([[[[0.5, 1e6], [0.1, 4e6]], [[0.6, 1e6], [0.0, 2e6]]]] * 2, dtype=torch.float64)
    lines = compare.table_lines(["quota", "other"], found, [1.5e6])
    assert lines == [
        "| | 1.5 M | over the last exit | times fewer |",
        "|---|---|---|---|",
        "| quota | 50.00 % | +10.00 [+10.00, +10.00] | 4 M |",
        "| other | +10.00 [+10.00, +10.00] | +0.00 [+0.00, +0.00] | 2.00 [2.00, 2.00] |",
    ]


def test_logits_are_kept(compare, checkpoints, printed, tmp_path):
    file = tmp_path / "logits.pth"
    words = ["--logits", file, "--halves", "2", "--mapped", "5", "--data_set", "DIGITS", "--device", "cpu"]
    words += ["--checkpoint", tmp_path / "msdnet.pth", "--num_workers", "1"]
    content = load(checkpoints["msdnet"])
    content["args"]["num_calib"] = 2
    save(tmp_path / "msdnet.pth", content)
    first = printed("compare_policies", *words)
    start = first.index("362 images, 2 random halves, 2 exits")  # of test, and those held out
    assert len(first[start:].splitlines()) == 8
    assert printed("compare_policies", "--logits", file, "--halves", "2", "--mapped", "5") == first[start:]


def test_a_file_of_something_else_is_refused(compare, checkpoints, printed):
    with pytest.raises(ValueError, match="no logits that can be read"):
        printed("compare_policies", "--logits", checkpoints["msdnet"])
