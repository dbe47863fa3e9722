"""Cascades of the same networks are compared under budgets and traffic."""

import pytest
import torch

from adaptive.exit_tables import ExitTables
from adaptive.policy import Policy
from adaptive.thresholds import cheapest


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_cascades")


def tables():
    confidence = torch.tensor([[0.9, 0.2, 0.8, 0.1], [1.0, 1.0, 1.0, 1.0]])
    correct = torch.tensor([[True, False, True, False], [True, True, False, False]])
    scores = confidence.expand(5, -1, -1)
    targets = torch.tensor([0, 0, 1, 1])
    return ExitTables(confidence, correct, correct, confidence, correct, scores, targets, targets)


def test_traffic_weighs_popular_classes(compare):
    assert compare.traffic(tables(), [0], 0.9).tolist() == pytest.approx([0.45, 0.45, 0.05, 0.05])
    assert compare.traffic(tables(), [], None).tolist() == [0.25] * 4


def test_a_cascade_of_some_networks_pays_for_each_once(compare):
    cascade = compare.Cascade([0, 1], (tables(), tables()), [10, 30], 5)
    assert cascade.costs == [10, 40]
    point = compare.operate(
        tables(), compare.traffic(tables(), [], None), torch.tensor([0.5, -1e8]), cascade.costs
    )
    assert point.accuracy == 0.75 and point.macs == 0.5 * 10 + 0.5 * 40 and point.shares == [0.5, 0.5]
    best = cascade.choose(lambda t: compare.traffic(t, [], None), lambda a, c: cheapest(a, c, 0.75))
    assert best == point


def run(printed, checkpoint, *words):
    networks = [f"weights={checkpoint}"] * 2
    data = ["--data_set", "DIGITS", "--num_workers", "1", "--device", "cpu"]
    return printed("compare_cascades", "--networks", *networks, "--steps", "3", *data, *words)


def test_cascades_are_compared(checkpoints, printed):
    words = ["--cascades", "0", "0,1", "--budgets", "1e3", "1e9", "--popular", "0", "--mixes", "0.5"]
    lines = run(printed, checkpoints["cifar_resnet"], *words).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("thresholds from"))
    assert lines[start].startswith("thresholds from 180 test images, figures of the other 180")
    shown = [line.split()[0] for line in lines[start:] if line.startswith("  ")]
    assert shown == ["0", "0,1"] * 2  # nothing is within the smaller budget


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("cifar_resnet", [], "name the cascades to compare"),
        ("cifar_resnet", ["--cascades", "0,2"], "--cascades 0,2: accepted: numbers from 0 to 1"),
        ("cifar_resnet", ["--cascades", "0", "--mixes", "0.5"], "--popular needs --mixes"),
        ("msdnet", ["--cascades", "0"], "2 networks with 4 exits in all; give networks of one exit"),
    ],
)
def test_what_cannot_be_compared_is_said(checkpoints, printed, name, words, message):
    with pytest.raises(ValueError, match=message):
        run(printed, checkpoints[name], *words)


def test_a_saved_policy_is_compared(checkpoints, printed, tmp_path):
    path, words = tmp_path / "p.json", ["--cascades", "0,1", "--popular", "0", "--mixes", "0.5", "--policy"]
    Policy((1e8, -1e8), "entropy", "mine", off=(0,)).save(path)
    here = ["--num_workers", "0"]
    lines = run(printed, checkpoints["cifar_resnet"], *words, path, *here).splitlines()
    alone = next(line.split() for line in lines if line.startswith("network 1: "))
    start = lines.index("policy 'mine'")
    first, second = (line.split() for line in lines if line.startswith("  saved "))
    assert lines[start + 1].split() == first and "50 % of the traffic" in lines[start + 2]
    assert first[1] == alone[2] and first[3] == second[3] == alone[4]  # network 1 alone
    assert first[-2:] == ["0.0", "100.0"]
