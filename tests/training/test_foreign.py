import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from training.checkpoint import load_weights, save
from training.foreign import fit_to, read_weights

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
WRAPPED = {"module." + key: value for key, value in WEIGHTS.items()}


def written(tmp_path, content):
    save(tmp_path / "x.pth", content)
    return tmp_path / "x.pth"


@pytest.fixture
def published():
    folder = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "ebjr"
    if not folder.is_dir():
        pytest.skip(f"published checkpoints not found in {folder}")
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {"model": WEIGHTS, "epoch": 3, "args": argparse.Namespace(model="x")},
        {"state_dict": WRAPPED, "arch": "msdnet", "best_prec1": 0.5},
        {"state_dict_ema": WEIGHTS},
        WEIGHTS,
        WRAPPED,
    ],
)
def test_weights_are_found_in_every_layout(tmp_path, content):
    weights, arch = read_weights(written(tmp_path, content))
    assert list(weights) == ["fc.weight", "fc.bias"]
    assert torch.equal(weights["fc.weight"], torch.ones(2, 3))
    assert arch is None


def test_our_architecture_is_returned(tmp_path):
    arch = {"name": "msdnet", "options": {}, "num_classes": 10}
    assert read_weights(written(tmp_path, {"model": WEIGHTS, "arch": arch}))[1] == arch


def test_model_key_chooses_in_order(tmp_path):
    other = {"fc.weight": torch.zeros(1)}
    path = written(tmp_path, {"model": WEIGHTS, "teacher": other})
    assert list(read_weights(path, model_key="student|teacher|model")[0]) == ["fc.weight"]


def test_ema_weights_are_read_on_request(tmp_path):
    ema = {"module.fc.weight": torch.full((2, 3), 5.0)}
    weights, _ = read_weights(written(tmp_path, {"model": WEIGHTS, "model_ema": ema}), ema=True)
    assert weights["fc.weight"][0, 0] == 5


@pytest.mark.parametrize("content", [{"model": WEIGHTS}, {"model": WEIGHTS, "model_ema": None}])
def test_missing_ema_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match=r"x.pth has no EMA weights"):
        read_weights(written(tmp_path, content), ema=True)


def test_prefix_of_some_keys_only_is_part_of_the_name(tmp_path):
    mixed = {"module.fc.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert list(read_weights(written(tmp_path, mixed))[0]) == list(mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "no weights under model.*state_dict; it holds epoch, optimizer"),
        ({}, "it holds nothing"),
        ({"model": {}}, "no weights"),
        ([1], "instead of a dict"),
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_weights(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_published_original_loads(published):
    weights, arch = read_weights(published / "original_cifar10_densenet-bc-52-6_model_best.pth.tar")
    assert "conv1.weight" in weights
    assert not any(key.startswith("module.") for key in weights)
    assert arch is None


def test_published_original_with_a_numpy_scalar_is_refused(published):
    name = "original_cifar10_densenet-bc-52-6_checkpoint.pth.tar"
    with pytest.raises(ValueError, match=f"{name} is refused: it holds numpy.core.multiarray.scalar;") as error:
        read_weights(published / name)
    assert "\n" not in str(error.value)


def test_fit_to_keeps_new_heads_and_takes_the_rest():
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "head": nn.Linear(4, 10), "extra": nn.Linear(1, 1)})
    source = nn.ModuleDict({"trunk": nn.Linear(3, 4), "head": nn.Linear(4, 100), "old": nn.Linear(1, 1)})
    fitted, kept = fit_to(model, source.state_dict())
    assert kept == ["head.weight", "head.bias", "extra.weight", "extra.bias"]
    initial = model["head"].weight.detach().clone()
    load_weights(model, fitted, "x.pth")
    assert torch.equal(model["trunk"].weight, source["trunk"].weight)
    assert torch.equal(model["head"].weight, initial)


def test_fit_to_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="none of the 2 given weights fits any of the model's 2"):
        fit_to(nn.Linear(3, 4), WEIGHTS)
