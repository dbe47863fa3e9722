"""Old checkpoints are rewritten without running what they hold."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from experiment.checkpoint import load
from models import create_model


@pytest.fixture(scope="module")
def convert(script):
    return script("convert_checkpoint")


def test_a_file_with_numpy_numbers_is_converted(convert, tmp_path):
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


def test_nothing_else_in_a_file_is_run(convert, tmp_path):
    torch.save({"state_dict": {}, "extra": Runs(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth is refused: it holds (\w*io\.open|builtins\.open)"):
        convert.main([str(tmp_path / "bad.pth"), str(tmp_path / "new.pth")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new.pth").exists()


def test_bytes_are_spelled_in_latin1_only(convert):
    assert convert.latin1("\xe9", "latin1") == b"\xe9"
    with pytest.raises(pickle.UnpicklingError):
        convert.latin1("abc", "rot13")


def test_weights_are_renamed_in_order(convert, tmp_path):
    own = create_model("cifar_alexnet", 4).state_dict()
    torch.save({f"layer_{i}": value for i, value in enumerate(own.values())}, tmp_path / "other.pth")
    convert.main([str(tmp_path / "other.pth"), str(tmp_path / "new.pth"), "--model", "cifar_alexnet"])
    found = load(tmp_path / "new.pth")["state_dict"]
    assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)
    with pytest.raises(ValueError, match="other.pth is not cifar_vgg11: 12 entries for 18"):
        convert.main([str(tmp_path / "other.pth"), str(tmp_path / "new.pth"), "--model", "cifar_vgg11"])
