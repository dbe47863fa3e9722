"""The benchmark of backends runs, and its figures follow from what was measured."""

import numpy as np
import pytest
import torch

from adaptive.policy import Policy
from deploy import decide


def test_both_tables(printed, checkpoints, tmp_path):
    policy = Policy((0.2, -1e8))
    policy.save(tmp_path / "policy.json")
    words = "--backends eager --precisions fp32 bf16 --images 12 --batch 4 --rounds 1 --policy"
    text = printed(
        "bench_backends",
        "--checkpoint",
        checkpoints["msdnet"],
        *words.split(),
        tmp_path / "policy.json",
    )
    lines = [line for line in text.splitlines() if line]
    about, chosen, first, heads, rows = *lines[:2], lines[2:5], lines[5], lines[6:]
    assert about.endswith("; 12 test images; micro-batches of 4") and chosen.endswith(
        f"thresholds {policy.thresholds} of max_prob"
    )
    assert [line.split()[:2] for line in first[1:]] == [["eager", "fp32"], ["eager", "bf16"]]
    assert heads.split()[:2] == ["backend", "network"]
    names = [" ".join(line.split()[:4]) for line in rows]
    assert names[0] == "eager fp32 early exit" and names[1] == "eager fp32 exit 1"
    assert [name for name in names if "early" in name][1] == "eager bf16 early exit"


def test_figures_of_a_row(script):
    module = script("bench_backends")
    early, alone = (
        module.Contestant("eager fp32", name, None, None, macs)
        for name, macs in ((module.EARLY, (1e6, 4e6)), ("x", (1e6, 8e6)))
    )
    early.logits = alone.logits = torch.eye(4)
    early.exits, alone.exits = torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.int64)
    early.rounds, early.singles = [1.0, 2.0, 3.0], [0.001] * 5
    alone.rounds, alone.singles = [6.0, 6.0, 6.0], [0.004] * 5
    moved = module.Contestant("openvino fp32", module.EARLY, None, None, (1e6, 4e6))
    moved.logits, moved.exits = torch.eye(4), torch.tensor([0, 1, 0, 1])
    moved.rounds, moved.singles = [0.5] * 3, [0.0005] * 5
    rows = list(module.rows_of([early, alone, moved], torch.tensor([0, 1, 2, 0])))
    assert rows[0][2:9] == (2, 1, 1, 1, 75, "0", 1.75) and rows[0][-2:] == (1, 1)
    assert rows[1][2:6] == (4 / 6, 4, 4, 4) and rows[1][9] == "4.57" and rows[1][10].startswith("3.00 [2.00,")
    assert rows[1][11] == "0.66" and rows[1][12:] == (2 / 6, 4)
    assert rows[2][7] == "1" and rows[2][-2:] == (4, 0.5)


def test_expected_speed_is_of_stages_by_the_share_that_reaches_them(script, monkeypatch):
    module = script("bench_backends")

    class Backend:
        def stages(self, off):
            return [lambda state: (torch.eye(4), {"rows": state})] * 2

        def alone(self, k):
            return lambda images, size: None

    spent = iter([[0.010, 0.010, 0.015], [0.002, 0.001]])  # stages and the last exit alone; hand-overs
    monkeypatch.setattr(module, "in_a_row", lambda calls, images: next(spent))
    found = module.expected(Backend(), Policy((0.5, -1e8)), torch.zeros(4, 3), torch.tensor([0, 0, 0, 1]))
    assert found.stages_ms == [10, 10] and found.alone_ms == 15
    assert found.hand_over_ms == pytest.approx(2 + 0.25 * 1)
    assert found.images_per_s == pytest.approx(1e3 * 4 / (10 + 2.5 + 2.25))


def test_an_exported_network_hands_over_what_its_runner_does(script, tmp_path):
    module = script("bench_backends")
    Policy((0.5, -1e8), answer="best").save(tmp_path / "policy.json")
    pool = module.Pool(4)
    policy = decide.Policy(tmp_path / "policy.json")
    memory = module.hand_over(policy, 0, np.eye(4), {}, {"map": np.arange(4)}, np.array([0, 2]), pool)
    assert pool.fill == 2 and pool.buffers["map"][:2].tolist() == [0, 2]
    assert set(memory) == {"answers", "highest"} < set(pool.buffers)
