"""Confidence, answers, mapped accuracy and patience of a checkpoint, and of the logits that it left."""

import pytest
import torch

from adaptive.costs import StageCosts
from experiment.logits import Logits, save

DATA = ("--device", "cpu", "--num_workers", 0)
WORDS = ("--halves", 2, "--accuracies", 0.1, 0.7)


def test_a_checkpoint_and_its_logits_give_the_same_tables(checkpoints, npz, printed, tmp_path):
    kept = tmp_path / "logits.pt"
    images = ("--data_set", "CIFAR10", "--data_path", npz, "--eval_data_path", npz, "--num_calib", 0, *DATA)
    words = ("--logits", kept, "--budgets", 0.8, *WORDS)
    given = ("--checkpoint", checkpoints["msdnet"], *images)
    text = printed("measure_confidence", *given, *words)
    again = printed("measure_confidence", *words)
    assert text.endswith(again) and again.startswith("4 calibration images, 4 test images, 2 halves of these")


@pytest.fixture
def logits(tmp_path):
    """A file of logits of three exits that know more and more."""
    generator, targets = torch.Generator().manual_seed(0), torch.arange(400) % 5
    exits = torch.randn(3, 400, 5, generator=generator)
    exits[:, torch.arange(400), targets] += torch.tensor([2.0, 3.0, 4.0])[:, None]
    costs = StageCosts((3, 3, 3), (1, 1, 1), ((), (0,), (0, 1)), (False,) * 3)
    save(tmp_path / "it.pt", Logits(exits, targets, 200, costs))
    return tmp_path / "it.pt"


def test_every_policy_has_its_row(logits, printed):
    lines = printed("measure_confidence", "--logits", logits, "--budgets", 0.5, *WORDS).splitlines()
    assert lines[0] == "200 calibration images, 200 test images, 2 halves of these"

    def row(start):
        (line,) = [line for line in lines[1:] if line.startswith(start + "   ") and line[-1] not in "%e"]
        return line[len(start) :].split()

    assert row("   0")[-1] != row("   2")[-1]
    # The exit's own answer is the base; all that is left to patience 3 of three exits is the last one.
    assert row("exit").count("+0.00") == 2 and float(row("mean, temperatures")[0]) > 80
    patient = row("patience 3, exit")
    assert patient[1] == "0.00" and float(row("patience 2, exit")[1]) <= float(patient[1])
    # Of answers that need not be right, the first will do.
    assert row("10 %, those left")[1:5] == row("10 %, everybody")[1:5] == ["-", "100", "0", "0"]
    assert float(row("70 %, those left")[0]) > 60 and float(row("70 %, everybody")[0]) > 60
