import argparse
import os
from pathlib import Path

import pytest
import torch

from datasets import Data, View
from experiment.checkpoint import save
from experiment.published import read, understood

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


WRAPPED = {"module." + key: value for key, value in WEIGHTS.items()}


PERCEIVER = "mobilenetV3_0x5_perceiver_t128"


def written(tmp_path, content):
    save(tmp_path / "x.pth", content)
    return tmp_path / "x.pth"


def read_weights(path, which="model", **options):
    return read(path).weights(which, **options)


def namespace(**changes):
    """What Dyn-Perceiver's script stored, in part."""
    flags = {
        "model": PERCEIVER,
        "drop_path": 0.3,
        "dropout": 0.0,
        "input_size": 64,
        "num_latent_channels": None,
        "SA_widening_factor": 2,
        "num_SA_heads": None,
        "depth_factor": [1, 1, 1, 2],
        "spatial_reduction": True,
        "with_isc": False,
        "data_path": "/home/somebody/ImageNet",
        "data_set": "IMNET",
        "nb_classes": 1000,
        "crop_pct": None,
        "imagenet_default_mean_and_std": True,
        "lr": 1e-3,
    }
    return argparse.Namespace(**flags | changes)


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
    path = written(tmp_path, content)
    weights = read_weights(path)
    assert list(weights) == ["fc.weight", "fc.bias"]
    assert torch.equal(weights["fc.weight"], torch.ones(2, 3))
    assert read(path).arch is None


def test_model_key_chooses_in_order(tmp_path):
    other = {"fc.weight": torch.zeros(1)}
    path = written(tmp_path, {"model": WEIGHTS, "teacher": other})
    assert list(read_weights(path, model_key="student|teacher|model")) == ["fc.weight"]


def test_ema_weights_are_read_on_request(tmp_path):
    ema = {"module.fc.weight": torch.full((2, 3), 5.0)}
    path = written(tmp_path, {"model": WEIGHTS, "model_ema": ema})
    assert read_weights(path, which="ema")["fc.weight"][0, 0] == 5
    assert read_weights(path, model_key="model_ema")["fc.weight"][0, 0] == 5


@pytest.mark.parametrize("content", [{"model": WEIGHTS}, {"model": WEIGHTS, "model_ema": None}])
def test_missing_ema_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match=r"x.pth has no EMA weights"):
        read_weights(written(tmp_path, content), which="ema")


def test_prefix_of_some_keys_only_is_part_of_the_name(tmp_path):
    mixed = {"module.fc.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert list(read_weights(written(tmp_path, mixed))) == list(mixed)


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
    weights = read_weights(published / "original_cifar10_densenet-bc-52-6_model_best.pth.tar")
    assert "conv1.weight" in weights
    assert not any(key.startswith("module.") for key in weights)


def test_published_original_with_a_numpy_scalar_is_refused(published):
    name = "original_cifar10_densenet-bc-52-6_checkpoint.pth.tar"
    with pytest.raises(
        ValueError, match=f"{name} is refused: it holds numpy.core.multiarray.scalar;"
    ) as error:
        read_weights(published / name)
    assert "\n" not in str(error.value)


def test_our_architecture_is_returned():
    arch = {"name": "msdnet", "options": {}, "num_classes": 10}
    assert understood({"model": WEIGHTS, "arch": arch}, "x.pth").arch == arch


def test_published_flags_name_the_architecture():
    options = {
        "input_size": 64,
        "SA_widening_factor": 2,
        "depth_factor": [1, 1, 1, 2],
        "spatial_reduction": True,
        "with_isc": False,
        "dropout": 0.0,
    }
    assert understood({"args": namespace()}, "x.pth").arch == {
        "name": PERCEIVER,
        "options": options,
        "num_classes": 1000,
    }


@pytest.mark.parametrize("name", ["convnext_tiny", None, torch.ones(3), ["reg800m"], "timm/resnet18"])
def test_a_published_name_that_is_not_ours_names_nothing(name):
    assert understood({"args": namespace(model=name)}, "x.pth").arch is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth_factor": "1112x"}, "depth_factor: 'x' is not of type int"),
        ({"depth_factor": 2}, "depth_factor: 'int' object is not iterable"),
        ({"SA_widening_factor": torch.ones(3)}, "SA_widening_factor: 'tensor.* is not of type int"),
        ({"with_isc": {"a": 1}}, "with_isc: .* is not true or false"),
    ],
)
def test_strange_flags_are_refused_in_one_line(changes, complaint):
    with pytest.raises(
        ValueError, match=f"^checkpoint x.pth was trained with a strange --{complaint}"
    ) as error:
        understood({"args": namespace(**changes)}, "x.pth")
    assert "\n" not in str(error.value)


def test_a_folder_of_another_machine_is_not_taken():
    assert understood({"args": namespace(crop_pct=0.9)}, "x.pth").values(Data, View) == {
        "data_set": "IMNET",
        "input_size": 64,
        "crop_pct": 0.9,
        "imagenet_default_mean_and_std": True,
    }
    ours = {"data_path": "images", "mean": (0.1, 0.2), "crop_pct": None, "epochs": 3}
    assert understood({"args": ours}, "x.pth").values(Data, View) == {
        "data_path": "images",
        "mean": [0.1, 0.2],
        "crop_pct": None,
    }
    for nothing in ({"args": "none"}, {}):
        assert understood(nothing, "x.pth").values(Data, View) == {}
