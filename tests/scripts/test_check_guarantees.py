"""The check of guarantees prints a row per demand, of saved logits or of a network."""

import pytest
import torch

from adaptive.costs import StageCosts
from experiment.logits import Logits, save


def rows_of(text):
    return [line.split() for line in text.splitlines()[-24:]]


@pytest.mark.parametrize("policies", ["search", "quotas"])
def test_saved_logits(tmp_path, printed, policies):
    torch.manual_seed(0)
    targets = torch.randint(3, (400,))
    known = 6 * torch.nn.functional.one_hot(targets, 3)
    logits = torch.stack([known + torch.randn(400, 3), known + 0.1 * torch.randn(400, 3)])
    costs = StageCosts((1.0, 3.0), (0.0, 0.0), ((), (0,)), (False, False))
    save(tmp_path / "it.pt", Logits(logits, targets, 100, costs))
    words = ["--logits", tmp_path / "it.pt", "--policies", policies]
    text = printed("check_guarantees", *words, "--rounds", 3, "--draw", 600)
    assert "3 rounds, 600 of 400 images each, full network 100.00 %\n" in text
    rows = rows_of(text)
    assert [row[0] for row in rows[:15:3]] == ["drop", "harm", "disagreement", "error", "cost"]
    # 300 images certify 2 % at 0.1, but no drop of 1 % at 0.05.
    assert rows[0][7:9] == ["100.0", "1.00"] and rows[1][7] == "0.0" and float(rows[1][8]) > 2
    assert rows[12][:5] == ["cost", "ltt", "50", "0.05", "0.0"] and rows[15][:4] == ["harm", "crc", "1", "-"]


def test_a_checkpoint(checkpoints, printed):
    text = printed("check_guarantees", "--checkpoint", checkpoints["msdnet"], "--rounds", 1, "--draw", 8)
    assert len(rows_of(text)) == 24
