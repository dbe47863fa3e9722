import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive.inference import ExitTables
from adaptive.thresholds import cheapest
from models import create_model
from training.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = script("convert_checkpoint")


def test_a_file_with_numpy_numbers_is_converted(tmp_path):
    weights = OrderedDict(a=torch.ones(2))
    content = {
        "state_dict": weights,
        "optimizer": {"lr": np.float64(0.1), "steps": [np.int64(3), (np.float32(2), None)]},
    }
    torch.save(content, tmp_path / "old.pth.tar")
    with pytest.raises(ValueError, match="is refused: it holds numpy.*scalar; only tensors and plain types"):
        load(tmp_path / "old.pth.tar")
    convert.main([str(tmp_path / "old.pth.tar"), str(tmp_path / "new.pth")])
    found = load(tmp_path / "new.pth")
    assert found["optimizer"] == {"lr": 0.1, "steps": [3, (2.0, None)]}
    assert torch.equal(found["state_dict"]["a"], weights["a"])


class Runs:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_nothing_else_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": {}, "extra": Runs(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth is refused: it holds (\w*io\.open|builtins\.open)"):
        convert.main([str(tmp_path / "bad.pth"), str(tmp_path / "new.pth")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new.pth").exists()


def test_bytes_are_spelled_in_latin1_only():
    assert convert.latin1("\xe9", "latin1") == b"\xe9"
    with pytest.raises(pickle.UnpicklingError):
        convert.latin1("abc", "rot13")


def test_weights_are_renamed_in_order(tmp_path):
    own = create_model("cifar_alexnet", 4).state_dict()
    torch.save({f"layer_{i}": value for i, value in enumerate(own.values())}, tmp_path / "other.pth")
    convert.main([str(tmp_path / "other.pth"), str(tmp_path / "new.pth"), "--model", "cifar_alexnet"])
    found = load(tmp_path / "new.pth")["state_dict"]
    assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)
    with pytest.raises(ValueError, match="other.pth is not cifar_vgg11: 12 entries for 18"):
        convert.main([str(tmp_path / "other.pth"), str(tmp_path / "new.pth"), "--model", "cifar_vgg11"])


compare = script("compare_cascades")


def tables():
    confidence = torch.tensor([[0.9, 0.2, 0.8, 0.1], [1.0, 1.0, 1.0, 1.0]])
    correct = torch.tensor([[True, False, True, False], [True, True, False, False]])
    scores = confidence.expand(5, -1, -1)
    return ExitTables(confidence, correct, correct, confidence, scores, torch.tensor([0, 0, 1, 1]))


def test_traffic_weighs_popular_classes():
    assert compare.traffic(tables(), [0], 0.9).tolist() == pytest.approx([0.45, 0.45, 0.05, 0.05])
    assert compare.traffic(tables(), [], None).tolist() == [0.25] * 4


def test_a_cascade_of_some_networks_pays_for_each_once():
    cascade = compare.Cascade([0, 1], (tables(), tables()), [10, 30], 5)
    assert cascade.costs == [10, 40]
    point = compare.operate(
        tables(), compare.traffic(tables(), [], None), torch.tensor([0.5, -1e8]), cascade.costs
    )
    assert point.accuracy == 0.75 and point.macs == 0.5 * 10 + 0.5 * 40 and point.shares == [0.5, 0.5]
    best = cascade.choose(lambda t: compare.traffic(t, [], None), lambda a, c: cheapest(a, c, 0.75))
    assert best == point
